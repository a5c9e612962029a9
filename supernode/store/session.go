package store

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
)

const (
	// writeBuffer is how many bytes are collected for one write: a write of
	// 1 MiB costs a third of the CPU time per byte of one of 25 KB.
	writeBuffer = 1 << 20
	// reserveStep is how much room of the quota an ingest takes at a time, unless
	// that is more than 1/64 of the quota.
	reserveStep = 8 << 20
)

// errEnded is returned by a session that was published or aborted.
var errEnded = errors.New("store: the ingest has ended")

// Ingest puts the chunks of one layer into the store. They can be read at once;
// they stay only if Publish succeeds. Put may be called from several
// goroutines; Publish and Abort end the session.
type Ingest struct {
	s     *Store
	layer blockdev.Digest
	id    uint64
	pack  *packFile

	// gate is held by reading for a Put, and by writing while a batch is made of
	// what was put, which nothing changes then. lists are those of earlier batches.
	gate  sync.RWMutex
	lists []extent

	mu       sync.Mutex
	sealed   bool // Publish has begun: chunks does not change any more
	ended    bool
	err      error // the first failed write; nothing is published after it
	size     int64 // bytes appended to the pack
	settled  int64 // bytes of the pack that are counted as the store's
	reserved int64 // bytes of the quota, for the rest
	chunks   map[blockdev.Digest]chunkRecord
	held     map[blockdev.Digest]struct{} // chunks that the store had already
	cur      *buffer                      // being filled
	writing  []*buffer                    // being written, or failed
	spare    []*buffer
}

// buffer is a part of the pack that is not in the file yet.
type buffer struct {
	start int64
	data  []byte
}

// Begin starts the ingest of a layer. The caller ends it with Publish or Abort.
func (s *Store) Begin(layer blockdev.Digest) (*Ingest, error) {
	id, err := s.sessions.newPack()
	if err != nil {
		return nil, err
	}
	pf, err := s.packs.create(id)
	if err != nil {
		return nil, err
	}
	in := &Ingest{
		s: s, layer: layer, id: id, pack: pf,
		chunks: make(map[blockdev.Digest]chunkRecord),
		held:   make(map[blockdev.Digest]struct{}),
	}
	s.sessions.enter(in)
	s.smaller.wakeUp() // to pause
	return in, nil
}

// Put stores one chunk or header piece, of at most blockdev.MaxChunk bytes,
// whose SHA-256 is d: the caller has computed d from data, Put does not do it
// again. What the store has already is not stored twice. data is not kept. It is
// stored raw: compressing it is left for later, see recompress.
// Errors wrap blockdev.ErrNoSpace where the quota or the disk is full.
func (in *Ingest) Put(ctx context.Context, d blockdev.Digest, data []byte) error {
	full, err := in.put(ctx, d, data)
	if err != nil || !full {
		return err
	}
	if err := in.commitBatch(ctx); err != nil {
		return in.fail(err)
	}
	return nil
}

// put says whether there is enough for a batch.
func (in *Ingest) put(ctx context.Context, d blockdev.Digest, data []byte) (full bool, err error) {
	in.gate.RLock()
	defer in.gate.RUnlock()
	if err := in.putOne(ctx, d, data); err != nil {
		return false, err
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.chunks)+len(in.held) >= in.s.cfg.batch, nil
}

func (in *Ingest) putOne(ctx context.Context, d blockdev.Digest, data []byte) error {
	if len(data) == 0 || len(data) > blockdev.MaxChunk {
		return fmt.Errorf("store: chunk of %d bytes, want 1 to %d", len(data), blockdev.MaxChunk)
	}
	in.mu.Lock()
	if err := in.usableLocked(); err != nil || in.sealed {
		in.mu.Unlock()
		return errors.Join(err, errSealed(in.sealed))
	}
	_, put := in.chunks[d]
	if _, held := in.held[d]; put || held {
		in.mu.Unlock()
		in.s.stats.dedup.Add(int64(len(data)))
		return nil
	}
	// From here on others that put the same chunk leave it to this call; if it
	// fails, the session has failed.
	in.chunks[d] = chunkRecord{}
	in.mu.Unlock()

	have, err := in.s.hold(d)
	if err != nil {
		return in.fail(err)
	}
	if have {
		in.mu.Lock()
		delete(in.chunks, d)
		_, twice := in.held[d] // two Puts at once
		in.held[d] = struct{}{}
		in.mu.Unlock()
		if twice {
			in.s.holds.release(d)
		}
		in.s.stats.dedup.Add(int64(len(data)))
		return nil
	}
	in.s.stats.putBytes.Add(int64(len(data)))
	in.s.stats.storedBytes.Add(int64(len(data)))
	_, err = in.append(ctx, data, func(e extent) {
		in.chunks[d] = chunkRecord{extent: e, raw: uint32(len(data)), flags: flagDue}
	})
	if err != nil {
		return in.fail(err)
	}
	return nil
}

func errSealed(sealed bool) error {
	if sealed {
		return errEnded
	}
	return nil
}

func (in *Ingest) usableLocked() error {
	if in.ended {
		return errEnded
	}
	return in.err
}

func (in *Ingest) fail(err error) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.err == nil {
		in.err = err
	}
	return err
}

// hold makes sure that d stays until the session ends, if the store has it.
// The hold is taken before the look, so that an eviction sees it in time.
func (s *Store) hold(d blockdev.Digest) (bool, error) {
	if !s.holds.hold(d) {
		return false, nil
	}
	r, ok, err := s.db.chunk(d)
	if ok && err == nil && !r.damaged() {
		return true, nil
	}
	s.holds.release(d)
	if errors.Is(err, blockdev.ErrCorrupt) {
		err = nil // the new copy replaces the damaged record
	}
	return false, err
}

// append adds b to the pack. placed is called with its place, under in.mu.
func (in *Ingest) append(ctx context.Context, b []byte, placed func(extent)) (extent, error) {
	e := extent{Pack: in.id, Length: uint32(len(b)), CRC: checksum(b)}
	if err := in.reserve(ctx, int64(len(b))); err != nil {
		return e, err
	}
	in.mu.Lock()
	if err := in.usableLocked(); err != nil {
		in.mu.Unlock()
		return e, err
	}
	var full *buffer
	if in.cur != nil && len(in.cur.data)+len(b) > writeBuffer {
		full = in.cur
		in.writing = append(in.writing, full)
		in.cur = nil
	}
	e.Offset = in.size
	var large *buffer
	switch {
	case len(b) > writeBuffer: // the index of a large layer: not copied
		large = &buffer{start: in.size, data: b}
		in.writing = append(in.writing, large)
	case in.cur == nil:
		in.cur = in.bufferLocked()
		fallthrough
	default:
		in.cur.data = append(in.cur.data, b...)
	}
	in.size += int64(len(b))
	if placed != nil {
		placed(e)
	}
	in.mu.Unlock()
	for _, w := range []*buffer{full, large} {
		if w == nil {
			continue
		}
		if err := in.write(w); err != nil {
			return e, err
		}
	}
	return e, nil
}

func (in *Ingest) bufferLocked() *buffer {
	if n := len(in.spare); n > 0 {
		b := in.spare[n-1]
		in.spare = in.spare[:n-1]
		b.start, b.data = in.size, b.data[:0]
		return b
	}
	return &buffer{start: in.size, data: make([]byte, 0, writeBuffer)}
}

// write puts a full buffer into the file, and only then gives it up: a reader that
// reads a chunk finds it in the one or in the other.
func (in *Ingest) write(b *buffer) error {
	if _, err := in.pack.f.WriteAt(b.data, b.start); err != nil {
		return diskError("write chunks", err)
	}
	in.pack.writeback(b.start, int64(len(b.data)))
	in.mu.Lock()
	defer in.mu.Unlock()
	for i, w := range in.writing {
		if w == b {
			in.writing = append(in.writing[:i], in.writing[i+1:]...)
			break
		}
	}
	// A reference list or an index may be larger than others need.
	if cap(b.data) == writeBuffer {
		in.spare = append(in.spare, b)
	}
	return nil
}

// reserve makes sure that the quota has room for n more bytes of this session.
func (in *Ingest) reserve(ctx context.Context, n int64) error {
	in.mu.Lock()
	need := in.size - in.settled + n - in.reserved
	in.mu.Unlock()
	if need <= 0 {
		return nil
	}
	// Several Puts may get here at once and take a step each; Publish gives
	// back what is too much.
	_, quota := in.s.space.numbers()
	take := max(need, min(reserveStep, quota/64))
	if err := in.s.reserve(ctx, take); err != nil {
		return err
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.ended {
		in.s.space.unreserve(take)
		return errEnded
	}
	in.reserved += take
	return nil
}

// find returns the record of a chunk of this session and, if its bytes are not
// in the file yet, the bytes.
func (in *Ingest) find(d blockdev.Digest) (r chunkRecord, data []byte, ok bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	r, ok = in.chunks[d]
	if !ok || r.raw == 0 {
		return r, nil, false
	}
	for _, b := range append(in.writing[:len(in.writing):len(in.writing)], in.cur) {
		if b == nil || r.Offset < b.start {
			continue
		}
		if at := r.Offset - b.start; at+int64(r.Length) <= int64(len(b.data)) {
			return r, append([]byte(nil), b.data[at:at+int64(r.Length)]...), true
		}
	}
	return r, nil, true
}

// Abort ends the session and drops what it has put, unless another diff has it
// too. It does nothing after Publish has succeeded, and may be called twice.
func (in *Ingest) Abort() {
	if !in.end() {
		return
	}
	in.gate.Lock() // a goroutine that makes a batch comes to an end first
	defer in.gate.Unlock()
	in.leave() // first, so that nobody looks for chunks in a pack that is gone
	in.s.packs.release(in.pack)
	if len(in.lists) > 0 {
		// Others may count on chunks of these batches.
		if err := in.s.drop(in.id); err != nil && !errors.Is(err, ErrClosed) {
			in.s.cfg.Log.Warn("store: cannot free the chunks of an aborted ingest; the next start tries again", "layer", in.layer, "error", err)
		}
	} else if err := in.s.packs.remove(in.id); err != nil {
		in.s.cfg.Log.Warn("store: cannot delete the pack of an aborted ingest; the next start tries again", "layer", in.layer, "error", err)
	}
	in.s.space.unreserve(in.reserved)
	in.unhold()
}

// end marks the session as ended; false if it was already.
func (in *Ingest) end() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	was := in.ended
	in.ended = true
	return !was
}

// leave takes the session out of the store's sight.
func (in *Ingest) leave() {
	in.s.sessions.leave(in)
	in.s.smaller.wakeUp()
}

// unhold lets go of the chunks that the session counted on, and collects those
// that it alone kept.
func (in *Ingest) unhold() {
	s := in.s
	for d := range in.held {
		s.holds.release(d)
	}
	if err := s.collectOrphans(); err != nil && !errors.Is(err, ErrClosed) {
		s.cfg.Log.Warn("store: cannot free chunks without references; the next start tries again", "error", err)
	}
}
