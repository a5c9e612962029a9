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

// CheckIndex checks the index.db of a store that no process has open. Errors wrap
// blockdev.ErrCorrupt for damage (a thorough Open starts with an empty store then) and
// boltcheck.ErrInUse.
func CheckIndex(dir string) error { return boltcheck.File(dbPath(dir), nil) }

// Check reads every chunk and compares it with its digest, and every index with its
// diff, while the store is in use. With mark, layers that have damage are forgotten,
// to be fetched again, as is done when a read finds it. What is forgotten already is
// passed over.
func (s *Store) Check(ctx context.Context, mark bool) (*Health, error) {
	c := &checker{s: s, mark: mark}
	if err := mapClosed(boltcheck.Live(s.db.DB, nil)); errors.Is(err, blockdev.ErrCorrupt) {
		s.db.doubtful.Store(true)
		c.found.add("index.db", "", "%v: restart the supernode, which begins with an empty store: layers are fetched again on request", err)
		return &c.found, nil
	} else if err != nil {
		return nil, err
	}
	if err := c.diffs(ctx); err != nil {
		return nil, err
	}
	if err := c.chunks(ctx); err != nil {
		return nil, err
	}
	for _, l := range s.List() {
		c.found.Layers++
		if l.Used.IsZero() {
			c.found.add("layer "+l.Layer.String(), "", "its diff %v is not here", l.DiffID)
		}
	}
	return &c.found, nil
}

// checker is one Check.
type checker struct {
	s     *Store
	mark  bool // layers that have damage are forgotten
	found Health
}

// forgets is what is done where damage is marked, for a finding.
func (c *checker) forgets() string {
	if c.mark {
		return forgotten
	}
	return ""
}

func (c *checker) diffs(ctx context.Context) error {
	for _, id := range c.s.catalogue.ids() {
		if ctx.Err() != nil {
			return fmt.Errorf("check store: %w", ctx.Err())
		}
		c.found.Diffs++
		missing, bad, err := c.diff(id)
		if err != nil {
			return err
		}
		if bad == nil || !errors.Is(bad, errOtherDiff) && c.s.catalogue.isForgotten(id) {
			continue
		}
		done := c.forgets()
		switch {
		case !c.mark:
		case errors.Is(bad, errOtherDiff):
			// A bit of the record's key has flipped. Nobody ever asks for this diff, so
			// nothing else would replace it.
			if err := c.s.remove(id, false); err != nil {
				return err
			}
			done = "removed; " + forgotten
		case missing != nil:
			c.s.damaged(missing)
		default:
			c.s.forgetLayers(id)
		}
		c.found.add("diff "+id.String(), done, "%v", bad)
	}
	return nil
}

var errOtherDiff = errors.New("the index belongs to diff")

// diff returns in bad what is wrong with a diff's index or reference list, and
// which chunks of that list have no record.
func (c *checker) diff(id blockdev.Digest) (missing map[blockdev.Digest]extent, bad, err error) {
	for range lookups {
		r, ok, err := c.s.db.diff(id)
		if errors.Is(err, blockdev.ErrCorrupt) {
			return nil, err, nil
		}
		if err != nil || !ok { // evicted
			return nil, nil, err
		}
		var b []byte
		missing = nil
		b, bad = c.s.packs.read(r.Index, nil)
		for _, e := range r.lists() {
			var refs []byte
			if bad == nil {
				refs, bad = c.s.packs.read(e, nil)
			}
			if bad == nil {
				missing, bad = c.refs(refs)
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
		if again, ok, err := c.s.db.diff(id); err == nil && ok && again.Index == r.Index {
			return missing, bad, nil // else it was moved, or evicted
		}
	}
	return nil, nil, nil
}

// refs looks whether every chunk of a reference list has a record.
func (c *checker) refs(list []byte) (missing map[blockdev.Digest]extent, err error) {
	const size = len(blockdev.Digest{})
	n := len(list) / size
	for len(list) >= size {
		batch := list[:min(len(list)/size, checkBatch)*size]
		list = list[len(batch):]
		err := c.s.db.view(func(tx *bolt.Tx) error {
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

// chunks goes through all records in portions.
func (c *checker) chunks(ctx context.Context) error {
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
		err := c.s.db.view(func(tx *bolt.Tx) error {
			all := tx.Bucket(bucketChunks).Cursor()
			k, _ := all.Seek(next)
			for ; k != nil && len(keys) < checkBatch; k, _ = all.Next() {
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
			at, bad, err := c.chunk(d, dec, raw)
			if err != nil {
				return err
			}
			if bad == nil {
				continue
			}
			if c.mark {
				c.s.damaged(map[blockdev.Digest]extent{d: at})
			}
			if len(c.found.Findings) < maxFindings {
				c.found.add("chunk "+d.String(), c.forgets(), "%v", bad)
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
		c.found.add("chunks", c.forgets(), "%d more are damaged", more)
	}
	return nil
}

// chunk returns in bad what is wrong with a chunk, and where it lies. One that
// is known to be damaged, and so not used, is passed over.
func (c *checker) chunk(d blockdev.Digest, dec *zstd.Decoder, raw []byte) (at extent, bad, err error) {
	for range lookups {
		r, ok, err := c.s.db.chunk(d)
		if errors.Is(err, blockdev.ErrCorrupt) {
			return extent{}, err, nil
		}
		if err != nil || !ok || r.damaged() {
			return extent{}, nil, err
		}
		data, bad := c.s.packs.read(r.extent, nil)
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
			c.found.Chunks++
			c.found.Bytes += int64(len(data))
			return extent{}, nil, nil
		}
		if !errors.Is(bad, blockdev.ErrCorrupt) {
			return extent{}, nil, bad
		}
		if again, ok, err := c.s.db.chunk(d); err == nil && ok && again.extent == r.extent {
			return r.extent, bad, nil // else it was moved, or evicted
		}
	}
	return extent{}, nil, nil
}
