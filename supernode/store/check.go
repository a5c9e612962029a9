package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"
	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/boltcheck"
)

// Health is what Check has looked at and found.
type Health struct {
	Chunks, Diffs, Layers int
	Bytes                 int64 // of chunks, uncompressed
	Findings              []blockdev.Finding
}

func (h *Health) add(where, repaired, format string, args ...any) {
	h.Findings = append(h.Findings, blockdev.Finding{Where: where, Problem: fmt.Sprintf(format, args...), Repaired: repaired})
}

// checkBatch is how many records one transaction reads: long ones keep pages from
// being used again.
const checkBatch = 256

// maxFindings bounds how many damaged chunks are named one by one.
const maxFindings = 100

const forgotten = "its layers are fetched again when they are asked for"

// CheckIndex checks the index.db of a store that nobody has open. Errors wrap
// blockdev.ErrCorrupt for damage (a thorough Open starts with an empty store then) and
// boltcheck.ErrInUse.
func CheckIndex(dir string) error {
	s := &Store{cfg: Config{Dir: dir}}
	return boltcheck.File(s.dbPath(), nil)
}

// Check reads every chunk and compares it with its digest, and every index with its
// diff, while the store is in use. With mark, layers that have damage are forgotten,
// to be fetched again, as is done when a read finds it. What is forgotten already is
// passed over.
func (s *Store) Check(ctx context.Context, mark bool) (*Health, error) {
	h := &Health{}
	if err := mapClosed(boltcheck.Live(s.db, nil)); errors.Is(err, blockdev.ErrCorrupt) {
		s.doubtful.Store(true)
		h.add("index.db", "", "%v: restart the supernode, which begins with an empty store: layers are fetched again when they are asked for", err)
		return h, nil
	} else if err != nil {
		return nil, err
	}
	if err := s.checkDiffs(ctx, h, mark); err != nil {
		return nil, err
	}
	if err := s.checkChunks(ctx, h, mark); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	h.Layers = len(s.layers)
	for l, r := range s.layers {
		if s.diffs[r.DiffID] == nil {
			h.add("layer "+l.String(), "", "its diff %v is not here", r.DiffID)
		}
	}
	return h, nil
}

func (s *Store) checkDiffs(ctx context.Context, h *Health, mark bool) error {
	for _, id := range s.diffIDs() {
		if ctx.Err() != nil {
			return fmt.Errorf("check store: %w", ctx.Err())
		}
		h.Diffs++
		missing, bad, err := s.checkDiff(id)
		if err != nil {
			return err
		}
		if bad == nil || !errors.Is(bad, errOtherDiff) && s.isForgotten(id) {
			continue
		}
		done := ""
		switch {
		case !mark:
		case errors.Is(bad, errOtherDiff):
			// A bit of the record's key has flipped. Nobody ever asks for this diff, so
			// nothing else would replace it.
			if err := s.remove(id, false); err != nil {
				return err
			}
			done = "removed; " + forgotten
		case missing != nil:
			s.damaged(missing)
			done = forgotten
		default:
			s.forgetLayers(id)
			done = forgotten
		}
		h.add("diff "+id.String(), done, "%v", bad)
	}
	return nil
}

// isForgotten says that a diff has no layer: it is given to nobody any more, and is
// replaced as soon as its layer is fetched again.
func (s *Store) isForgotten(id blockdev.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.diffs[id]
	return d != nil && len(d.layers) == 0
}

var errOtherDiff = errors.New("index is that of diff")

// checkDiff returns in bad what is wrong with a diff's index or reference list, and
// which chunks of that list have no record.
func (s *Store) checkDiff(id blockdev.Digest) (missing map[blockdev.Digest]extent, bad, err error) {
	for range lookups {
		r, ok, err := s.diffRecord(id)
		if errors.Is(err, blockdev.ErrCorrupt) {
			return nil, err, nil
		}
		if err != nil || !ok { // evicted
			return nil, nil, err
		}
		var b []byte
		missing = nil
		b, bad = s.packs.read(r.Index, nil)
		for _, e := range r.lists() {
			var refs []byte
			if bad == nil {
				refs, bad = s.packs.read(e, nil)
			}
			if bad == nil {
				missing, bad = s.checkRefs(refs)
			}
		}
		if bad == nil {
			var ix *blockdev.Index
			if ix, bad = index.Decode(b); bad == nil && ix.DiffID != id {
				bad = fmt.Errorf("%w %v: %w", errOtherDiff, ix.DiffID, blockdev.ErrCorrupt)
			}
		}
		if bad == nil {
			return nil, nil, nil
		}
		if !errors.Is(bad, blockdev.ErrCorrupt) {
			return nil, nil, bad
		}
		if again, ok, err := s.diffRecord(id); err == nil && ok && again.Index == r.Index {
			return missing, bad, nil // else it was moved, or evicted
		}
	}
	return nil, nil, nil
}

// checkRefs looks whether every chunk of a reference list has a record.
func (s *Store) checkRefs(list []byte) (missing map[blockdev.Digest]extent, err error) {
	const size = len(blockdev.Digest{})
	n := len(list) / size
	for len(list) >= size {
		batch := list[:min(len(list)/size, checkBatch)*size]
		list = list[len(batch):]
		err := s.view(func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketChunks)
			for ; len(batch) > 0; batch = batch[size:] {
				if b.Get(batch[:size]) != nil {
					continue
				}
				if missing == nil {
					missing = make(map[blockdev.Digest]extent)
				}
				missing[blockdev.Digest(batch[:size])] = extent{}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if missing != nil {
		return missing, fmt.Errorf("%d of its %d chunks have no record: %w", len(missing), n, blockdev.ErrCorrupt)
	}
	return nil, nil
}

// checkChunks goes through all records in portions.
func (s *Store) checkChunks(ctx context.Context, h *Health, mark bool) error {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return fmt.Errorf("check store: %w", err)
	}
	defer dec.Close()
	raw := make([]byte, 0, blockdev.MaxChunk)
	more := 0
	var next []byte
	for {
		keys := make([]blockdev.Digest, 0, checkBatch)
		err := s.view(func(tx *bolt.Tx) error {
			c := tx.Bucket(bucketChunks).Cursor()
			k, _ := c.Seek(next)
			for ; k != nil && len(keys) < checkBatch; k, _ = c.Next() {
				if len(k) == len(blockdev.Digest{}) {
					keys = append(keys, blockdev.Digest(k))
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, d := range keys {
			if ctx.Err() != nil {
				return fmt.Errorf("check store: %w", ctx.Err())
			}
			at, bad, err := s.checkChunk(d, dec, raw, h)
			if err != nil {
				return err
			}
			if bad == nil {
				continue
			}
			done := ""
			if mark {
				s.damaged(map[blockdev.Digest]extent{d: at})
				done = forgotten
			}
			if len(h.Findings) < maxFindings {
				h.add("chunk "+d.String(), done, "%v", bad)
			} else {
				more++
			}
		}
		if len(keys) < checkBatch {
			break
		}
		next = append(keys[len(keys)-1][:], 0)
	}
	if more > 0 {
		done := ""
		if mark {
			done = forgotten
		}
		h.add("chunks", done, "%d more are damaged", more)
	}
	return nil
}

// checkChunk returns in bad what is wrong with a chunk, and where it lies. One that
// is known to be damaged, and so not used, is passed over.
func (s *Store) checkChunk(d blockdev.Digest, dec *zstd.Decoder, raw []byte, h *Health) (at extent, bad, err error) {
	for range lookups {
		r, ok, err := s.lookup(d)
		if errors.Is(err, blockdev.ErrCorrupt) {
			return extent{}, err, nil
		}
		if err != nil || !ok || r.damaged() {
			return extent{}, nil, err
		}
		data, bad := s.packs.read(r.extent, nil)
		if bad == nil && r.flags&flagZstd != 0 {
			if data, bad = dec.DecodeAll(data, raw[:0]); bad != nil {
				bad = fmt.Errorf("%w: %w", blockdev.ErrCorrupt, bad)
			}
		}
		if bad == nil {
			if bad = (blockdev.Chunk{Length: r.raw, Digest: d}).Check(data); bad != nil {
				bad = fmt.Errorf("pack %016x offset %d: %w", r.Pack, r.Offset, bad)
			}
		}
		if bad == nil {
			h.Chunks++
			h.Bytes += int64(len(data))
			return extent{}, nil, nil
		}
		if !errors.Is(bad, blockdev.ErrCorrupt) {
			return extent{}, nil, bad
		}
		if again, ok, err := s.lookup(d); err == nil && ok && again.extent == r.extent {
			return r.extent, bad, nil // else it was moved, or evicted
		}
	}
	return extent{}, nil, nil
}
