package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// LayerRecord is what the store knows about a layer.
type LayerRecord struct {
	// Layer is the digest of the compressed blob, Size its length in bytes.
	Layer blockdev.Digest
	Size  int64
	// DiffID names the diff that the layer holds.
	DiffID blockdev.Digest
	// Origins are who has shown to have the blob: "host/repository" or "host" of a
	// registry, or whatever the caller means by it.
	Origins []string
}

// maxOrigins bounds the origins remembered per layer; the newest are. One that is
// forgotten has to show once more that it has the layer.
const maxOrigins = 256

// refBytesInDB is about what one new chunk adds to index.db, with its entry in
// due.
const refBytesInDB = 280

// Publish makes the layer visible, at once and durably: when it returns nil, a
// restart finds layer, index and chunks. chunks are the digests of all chunks
// and header pieces of the index, in any order, repeated or not; every one of
// them was put in this session or is in the store already. Publishing a diff
// that is there replaces its index and adds the layer. On error the session is
// aborted, and nothing has changed. Errors wrap blockdev.ErrNoSpace, or
// blockdev.ErrCorrupt if a chunk that the session counted on turned out damaged.
func (in *Ingest) Publish(ctx context.Context, rec LayerRecord, encodedIndex []byte, chunks []blockdev.Digest) error {
	defer in.Abort() // does nothing once published
	if rec.Layer != in.layer {
		return fmt.Errorf("store: layer %s published in the ingest of %s", rec.Layer, in.layer)
	}
	refs := slices.Clone(chunks)
	slices.SortFunc(refs, compareDigests)
	refs = slices.Compact(refs)
	list := make([]byte, 0, len(refs)*len(blockdev.Digest{}))
	for _, d := range refs {
		list = append(list, d[:]...)
	}
	diff := diffRecord{Used: time.Now().Unix()}
	var err error
	if diff.Refs, err = in.append(ctx, list, nil); err != nil {
		return err
	}
	if diff.Index, err = in.append(ctx, encodedIndex, nil); err != nil {
		return err
	}
	if err := in.reserve(ctx, int64(len(refs))*refBytesInDB); err != nil {
		return err
	}
	if err := in.sync(); err != nil {
		return err
	}
	in.s.commit.Lock()
	defer in.s.commit.Unlock()
	old, err := in.s.freeable(rec.DiffID)
	if err != nil {
		return err
	}
	layer := layerRecord{DiffID: rec.DiffID, Size: rec.Size, Origins: rec.Origins}
	err = in.s.update(func(c *change) error {
		if err := in.record(c, refs, old); err != nil {
			return err
		}
		if err := c.replaceDiff(rec.DiffID, old); err != nil {
			return err
		}
		if err := c.putJSON(bucketDiffs, rec.DiffID, diff); err != nil {
			return err
		}
		layer.Origins = mergeOrigins(rec.Origins, in.s.originsOf(rec.Layer))
		if err := c.putJSON(bucketLayers, rec.Layer, layer); err != nil {
			return err
		}
		in.mu.Lock()
		c.reserved = in.reserved
		in.mu.Unlock()
		c.committed = func() {
			in.s.published(rec.Layer, layer)
			in.end()
			in.leave()
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	in.s.packs.release(in.pack)
	in.unhold()
	return nil
}

// compareDigests is the order of reference lists.
func compareDigests(a, b blockdev.Digest) int { return bytes.Compare(a[:], b[:]) }

// sync writes what is buffered and makes the pack durable.
func (in *Ingest) sync() error {
	in.mu.Lock()
	if err := in.usableLocked(); err != nil {
		in.mu.Unlock()
		return err
	}
	in.sealed = true
	var rest []*buffer
	if in.cur != nil {
		in.writing = append(in.writing, in.cur)
		in.cur = nil
	}
	// Only this call writes now: a sealed session takes no more Puts.
	rest = append(rest, in.writing...)
	in.mu.Unlock()
	for _, b := range rest {
		if err := in.write(b); err != nil {
			return err
		}
	}
	if err := in.pack.f.Sync(); err != nil {
		return diskError("sync chunks", err)
	}
	return syncDir(in.s.packs.dir)
}

// record gives every chunk of refs one more reference. What the session has
// put is used where the store has no good copy, and given up elsewhere. old are the
// references of the diff's earlier version, which are dropped next. The session is
// sealed, so its chunks may be read without the lock.
func (in *Ingest) record(c *change, refs, old []blockdev.Digest) error {
	c.live[in.id] += 2 // index and reference list
	used := make(map[blockdev.Digest]struct{}, len(in.chunks))
	for _, d := range refs {
		own, mine := in.chunks[d]
		r, ok, err := c.chunk(d)
		if !ok {
			// Its record is gone, as when a bit of the key has flipped.
			if _, had := slices.BinarySearchFunc(old, d, compareDigests); had {
				err = blockdev.ErrCorrupt
			}
		}
		switch {
		case err != nil: // where the chunk was is unknown
			if err := c.wantRecount(); err != nil {
				return err
			}
			if !mine {
				return fmt.Errorf("store: chunk %s: %w", d, err)
			}
			// Others may refer to it.
			r = own
			r.refs = manyRefs
			c.live[in.id]++
			used[d] = struct{}{}
		case ok && !r.damaged():
			r.refs++
		case !mine && ok:
			return fmt.Errorf("store: chunk %s was found damaged meanwhile: %w", d, blockdev.ErrCorrupt)
		case !mine:
			return fmt.Errorf("store: chunk %s of the index was not put", d)
		default:
			n := r.refs
			if ok {
				if err := c.freeChunk(r); err != nil {
					return err
				}
			}
			r = own
			r.refs = n + 1
			c.live[in.id]++
			used[d] = struct{}{}
		}
		if err := c.putChunk(d, r); err != nil {
			return err
		}
		if _, ok := used[d]; ok {
			if err := c.addDue(d, r); err != nil {
				return err
			}
		}
	}
	for d, own := range in.chunks {
		if _, ok := used[d]; !ok {
			c.discard(own.extent)
		}
	}
	return nil
}

// replaceDiff drops the references and extents of a diff's earlier version.
func (c *change) replaceDiff(id blockdev.Digest, old []blockdev.Digest) error {
	r, ok, err := getDiff(c.tx, id)
	if err != nil {
		return c.wantRecount()
	}
	if !ok {
		return nil
	}
	if old == nil {
		// Damaged, or the diff came between: what it had is freed by the recount.
		return c.wantRecount()
	}
	for _, d := range old {
		if err := c.unref(d); err != nil {
			return err
		}
	}
	c.free(r.Index)
	c.free(r.Refs)
	return nil
}

// refsOf returns the reference list of a diff: nil if there is no such diff or
// the list is damaged.
func (s *Store) refsOf(id blockdev.Digest) ([]blockdev.Digest, error) {
	r, ok, err := s.diffRecord(id)
	if err != nil || !ok {
		return nil, err
	}
	b, err := s.packs.read(r.Refs, nil)
	if err != nil {
		s.cfg.Log.Error("store: the reference list of a diff is damaged", "diff", id, "error", err)
		return nil, nil
	}
	refs := make([]blockdev.Digest, len(b)/len(blockdev.Digest{}))
	for i := range refs {
		copy(refs[i][:], b[i*len(refs[i]):])
	}
	return refs, nil
}

// freeable is refsOf for who frees what a diff has: nil also if its index is not where
// its record says. What lies there then may be somebody else's.
func (s *Store) freeable(id blockdev.Digest) ([]blockdev.Digest, error) {
	r, ok, err := s.diffRecord(id)
	if errors.Is(err, blockdev.ErrCorrupt) || err == nil && !ok {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if _, err := s.packs.read(r.Index, nil); err != nil {
		s.cfg.Log.Error("store: the index of a diff is damaged", "diff", id, "error", err)
		return nil, nil
	}
	return s.refsOf(id)
}

// published brings the memory up to date with what was committed.
func (s *Store) published(layer blockdev.Digest, r layerRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if prev, ok := s.layers[layer]; ok && prev.DiffID != r.DiffID {
		if st := s.diffs[prev.DiffID]; st != nil {
			st.layers = slices.DeleteFunc(st.layers, func(d blockdev.Digest) bool { return d == layer })
		}
	}
	s.layers[layer] = r
	st := s.diffs[r.DiffID]
	if st == nil {
		st = &diffState{}
		s.diffs[r.DiffID] = st
	}
	st.used = s.useLocked()
	if !slices.Contains(st.layers, layer) {
		st.layers = append(st.layers, layer)
	}
}

func (s *Store) originsOf(layer blockdev.Digest) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.layers[layer].Origins
}

// mergeOrigins returns both lists as one, bounded; what is in the first list stays.
func mergeOrigins(newer, older []string) []string {
	out := slices.Clone(newer)
	for _, o := range older {
		if !slices.Contains(out, o) {
			out = append(out, o)
		}
	}
	return out[:min(len(out), maxOrigins)]
}
