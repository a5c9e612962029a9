package store

import (
	"encoding/binary"
	"errors"

	"github.com/shoalfs/shoal/blockdev"
)

// errNoRoom: the quota or the disk has no room for even one compressed chunk.
var errNoRoom = errors.New("store: no room to compress in")

// errNothing: no chunk that is due can be dealt with. The last of them have just
// been evicted, or index.db takes no writes.
var errNothing = errors.New("store: nothing to compress")

// runSlack is reserved for what a run adds to the disk beside the chunks: the
// end of the last block, and pages of index.db.
const runSlack = 128 << 10

// run compresses due chunks, in the order in which they lie on disk, so that
// what it frees is contiguous, into one new pack. Nothing changes before commit,
// and a crash before that leaves a pack that no transaction has named.
type run struct {
	s     *Store
	after []byte // key in due of the last chunk done
	moves []move
	raw   int64 // bytes of the chunks done

	id       uint64
	pack     *packFile
	size     int64 // bytes in the pack, with those in out
	reserved int64 // bytes of the quota

	in, out []byte // a chunk that was read; what is not written yet
}

// move is a chunk that a run has dealt with.
type move struct {
	due
	to   extent
	zstd bool // else it stays where it is
}

func newRun(s *Store) *run { return &run{s: s} }

func (r *run) empty() bool { return len(r.moves) == 0 }

// reset forgets everything but the buffers.
func (r *run) reset() {
	*r = run{s: r.s, moves: r.moves[:0], in: r.in[:0], out: r.out[:0]}
}

// drop undoes what was not committed.
func (r *run) drop() {
	if r.pack != nil {
		r.s.packs.release(r.pack)
		if err := r.s.packs.remove(r.id); err != nil {
			r.s.cfg.Log.Warn("store: cannot delete a pack; the next start tries again", "error", err)
		}
	}
	r.s.space.unreserve(r.reserved)
	r.reset()
}

// step compresses some more chunks; it ends early if an ingest begins or the
// store is closed. more is false if no more are due, or there is no room for
// them before commit.
func (r *run) step() (more bool, err error) {
	todo, err := r.s.db.dueAfter(r.after, r.s.cfg.stepBytes)
	if err == nil && len(todo) == 0 && r.empty() {
		err = errNothing
	}
	if err != nil || len(todo) == 0 {
		return false, err
	}
	free, err := r.s.space.free()
	if err != nil {
		return false, err
	}
	free -= runSlack
	for _, t := range todo {
		if r.s.stopping() || r.s.sessions.any() {
			return true, nil
		}
		before := r.size
		err := r.do(t, free)
		if errors.Is(err, errNoRoom) && !r.empty() {
			return false, nil // commit makes some
		}
		if err != nil {
			return false, err
		}
		free -= r.size - before
		r.after = t.key
		r.raw += int64(t.rec.raw)
	}
	return true, nil
}

// do compresses one chunk, if that makes it at most free bytes.
func (r *run) do(t due, free int64) error {
	if t.stale {
		r.moves = append(r.moves, move{due: t})
		return nil
	}
	var err error
	r.in, err = r.s.packs.read(t.rec.extent, r.in[:0])
	if errors.Is(err, blockdev.ErrCorrupt) {
		now, ok, lerr := r.s.db.chunk(t.d)
		if lerr == nil && ok && now.extent == t.rec.extent {
			r.s.damaged(map[blockdev.Digest]extent{t.d: t.rec.extent})
		}
		return nil // else it was evicted
	}
	if err != nil {
		return err
	}
	return r.s.smaller.comp.compress(r.in, func(stored []byte, isZstd bool) error {
		m := move{due: t, zstd: isZstd}
		if isZstd {
			if int64(len(stored)) > free {
				return errNoRoom
			}
			var err error
			if m.to, err = r.append(stored); err != nil {
				return err
			}
		}
		r.moves = append(r.moves, m)
		return nil
	})
}

// append adds b to the pack. It evicts nothing to get room: the room that it
// needs is small, and what it makes is for diffs that would be evicted.
func (r *run) append(b []byte) (extent, error) {
	need := int64(len(b))
	if r.reserved == 0 {
		need += runSlack
	}
	if !r.s.space.reserve(need) {
		return extent{}, errNoRoom
	}
	r.reserved += need
	if r.pack == nil {
		id, err := r.s.sessions.newPack()
		if err != nil {
			return extent{}, err
		}
		if r.pack, err = r.s.packs.create(id); err != nil {
			return extent{}, err
		}
		r.id = id
	}
	if len(r.out)+len(b) > writeBuffer {
		if err := r.flush(); err != nil {
			return extent{}, err
		}
	}
	e := extent{Pack: r.id, Offset: r.size, Length: uint32(len(b)), CRC: checksum(b)}
	r.out = append(r.out, b...)
	r.size += int64(len(b))
	return e, nil
}

func (r *run) flush() error {
	if len(r.out) == 0 {
		return nil
	}
	if _, err := r.pack.f.WriteAt(r.out, r.size-int64(len(r.out))); err != nil {
		return diskError("write chunks", err)
	}
	r.out = r.out[:0]
	return nil
}

// commit makes the new places known and frees the old ones. The run is empty
// again if it succeeds. It looks at every chunk again: evictions, repairs and
// ingests go on beside a run.
func (r *run) commit() error {
	if r.empty() {
		r.reset()
		return nil
	}
	r.s.at("written")
	if r.pack != nil {
		if err := r.flush(); err != nil {
			return err
		}
		if err := r.pack.f.Sync(); err != nil {
			return diskError("sync chunks", err)
		}
		if err := r.s.packs.sync(); err != nil {
			return err
		}
	}
	r.s.at("synced")
	var saved int64
	err := r.s.update(func(c *change) error {
		saved = 0
		c.reserved = r.reserved
		c.committed = func() { r.s.at("committed") }
		if r.pack != nil {
			c.live[r.id] += 0 // none left: the pack goes
		}
		for _, m := range r.moves {
			n, err := c.move(m)
			if err != nil {
				return err
			}
			saved += n
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.s.stats.storedBytes.Add(-saved)
	if r.pack != nil {
		r.s.packs.release(r.pack)
	}
	r.reset()
	return nil
}

// move makes a chunk's new place, or that it stays, known. It returns by how
// many bytes the chunk became shorter.
func (c *change) move(m move) (saved int64, err error) {
	if err := c.dropDue(m.key); err != nil {
		return 0, err
	}
	r, ok, err := c.chunk(m.d)
	if err != nil {
		err = c.wantRecount()
		ok = false
	}
	if m.stale || !ok || r.extent != m.rec.extent || r.flags&flagDue == 0 {
		if m.zstd {
			c.discard(m.to)
		}
		return 0, err
	}
	r.flags &^= flagDue
	if m.zstd {
		saved = int64(r.Length) - int64(m.to.Length)
		c.free(r.extent)
		r.extent = m.to
		r.flags |= flagZstd
		c.live[m.to.Pack]++
	}
	return saved, c.putChunk(m.d, r)
}

// dueKey is where a chunk lies; entries sort as on disk.
func dueKey(e extent) []byte { return deadKey(e.Pack, e.Offset) }

const dueValueLen = len(blockdev.Digest{}) + 4

// addDue notes that a chunk is to be compressed.
func (c *change) addDue(d blockdev.Digest, r chunkRecord) error {
	c.due += int64(r.raw)
	v := binary.LittleEndian.AppendUint32(append(make([]byte, 0, dueValueLen), d[:]...), r.raw)
	return c.tx.Bucket(bucketDue).Put(dueKey(r.extent), v)
}

// dropDue takes an entry out, if it is there.
func (c *change) dropDue(key []byte) error {
	b := c.tx.Bucket(bucketDue)
	v := b.Get(key)
	if v == nil {
		return nil
	}
	c.due -= dueLength(v)
	return b.Delete(key)
}

// dueLength is the raw length in an entry.
func dueLength(v []byte) int64 {
	if len(v) != dueValueLen {
		return 0
	}
	return int64(binary.LittleEndian.Uint32(v[len(v)-4:]))
}
