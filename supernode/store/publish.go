package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

// LayerRecord is what the store knows about a layer.
type LayerRecord struct {
	// Layer is the digest of the compressed blob, Size its length in bytes.
	Layer blockdev.Digest
	Size  int64
	// DiffID names the diff that the layer holds.
	DiffID blockdev.Digest
	// Origins are the registries that have shown to have the blob: "host/repository" or "host" of a
	// registry, or what the caller means by it.
	Origins []string
}

// maxOrigins bounds the origins remembered per layer; the newest are. One that is
// forgotten has to show again that it has the layer.
const maxOrigins = 256

// refBytesInDB is about what one new chunk adds to index.db, with its entry in
// due.
const refBytesInDB = 280

// Publish makes the layer visible, at once and durably: when it returns nil, a
// restart finds layer, index and chunks. chunks are the digests of all chunks
// and header pieces of the index, in any order, repeated or not, each time that they
// are gone through; every one of them was put in this session, or is in the store
// already if the session is a small one. Publishing a diff
// that is there replaces its index and adds the layer. On error the session is
// aborted, and nothing has changed. Errors wrap blockdev.ErrNoSpace, or
// blockdev.ErrCorrupt if a chunk that the session counted on turned out damaged.
func (in *Ingest) Publish(ctx context.Context, rec LayerRecord, encodedIndex []byte, chunks iter.Seq[blockdev.Digest]) error {
	defer in.Abort() // does nothing once published
	if rec.Layer != in.layer {
		return fmt.Errorf("store: layer %s published in the ingest of %s", rec.Layer, in.layer)
	}
	drops, err := in.publish(ctx, rec, encodedIndex, chunks)
	if err != nil {
		return err
	}
	in.s.packs.release(in.pack)
	in.unhold()
	in.s.dropped(drops)
	return nil
}

// dropped frees what is left of diffs with many lists. What fails is tried again at
// the next Open.
func (s *Store) dropped(drops []uint64) {
	for _, id := range drops {
		if err := s.drop(id); err != nil && !errors.Is(err, ErrClosed) {
			s.cfg.Log.Error("store: cannot free the chunks of a removed diff; the next start tries again", "error", err)
		}
	}
}

// errMarked: chunks were found damaged since it was looked whether any is.
var errMarked = errors.New("store: chunks were found damaged during the ingest")

func (in *Ingest) publish(ctx context.Context, rec LayerRecord, encodedIndex []byte, chunks iter.Seq[blockdev.Digest]) (drops []uint64, err error) {
	in.gate.Lock()
	defer in.gate.Unlock()
	refs := in.batchRefs()
	if len(in.lists) == 0 {
		refs = distinct(chunks)
	}
	diff := diffRecord{Used: time.Now().Unix()}
	list, err := in.appendList(ctx, refs)
	if err != nil {
		return nil, err
	}
	lists := append(slices.Clip(in.lists), list)
	diff.Refs, diff.More = lists[0], lists[1:]
	if diff.Index, err = in.append(ctx, encodedIndex, nil); err != nil {
		return nil, err
	}
	if err := in.seal(); err != nil {
		return nil, err
	}
	in.s.commit.Lock()
	defer in.s.commit.Unlock()
	old, err := in.s.freeable(rec.DiffID)
	if err != nil {
		return nil, err
	}
	if old != nil && len(in.lists) > 0 {
		twice, err := in.countedTwice(rec.DiffID)
		if err != nil {
			return nil, err
		}
		if !twice {
			old = nil // left to the recount
		}
	}
	for {
		marks := in.s.damage.marks.Load()
		if len(in.lists) > 0 {
			if err := in.verify(ctx, chunks); err != nil {
				return nil, err
			}
		}
		drops, err = in.publishIn(ctx, rec, diff, refs, old, marks)
		if !errors.Is(err, errMarked) {
			return drops, err
		}
	}
}

// publishIn is the transaction that publishes.
func (in *Ingest) publishIn(ctx context.Context, rec LayerRecord, diff diffRecord, refs []blockdev.Digest, old *freeing, marks int64) (drops []uint64, err error) {
	layer := layerRecord{DiffID: rec.DiffID, Size: rec.Size, Origins: rec.Origins}
	err = in.s.update(func(c *change) error {
		if len(in.lists) > 0 && in.s.damage.marks.Load() != marks {
			return errMarked
		}
		c.live[in.id]++ // the index
		if err := in.record(c, refs, old); err != nil {
			return err
		}
		if err := c.replaceDiff(rec.DiffID, old); err != nil {
			return err
		}
		if len(in.lists) > 0 {
			if err := errors.Join(c.newFormat(), c.tx.Bucket(bucketUnpublished).Delete(packKey(in.id))); err != nil {
				return err
			}
		}
		if err := c.putJSON(bucketDiffs, rec.DiffID, diff); err != nil {
			return err
		}
		known, _ := in.s.catalogue.record(rec.Layer)
		layer.Origins = mergeOrigins(rec.Origins, known.Origins)
		if err := c.putJSON(bucketLayers, rec.Layer, layer); err != nil {
			return err
		}
		c.reserved = in.takeReserved()
		drops = c.drops
		c.committed = func() {
			in.s.catalogue.publish(rec.Layer, layer)
			in.end()
			in.leave()
		}
		return ctx.Err()
	})
	return drops, err
}

// distinct returns each digest once, in order. A layer that has the same few chunks
// again and again takes no more room than these.
func distinct(chunks iter.Seq[blockdev.Digest]) []blockdev.Digest {
	set := make(map[blockdev.Digest]struct{})
	for d := range chunks {
		set[d] = struct{}{}
	}
	return slices.SortedFunc(maps.Keys(set), compareDigests)
}

// verify makes sure that all chunks are in this batch or in the store: those of
// earlier batches may have been found damaged since.
func (in *Ingest) verify(ctx context.Context, chunks iter.Seq[blockdev.Digest]) error {
	batch := make([]blockdev.Digest, 0, checkBatch)
	look := func() error {
		err := in.s.db.view(func(tx *bolt.Tx) error {
			for _, d := range batch {
				v := tx.Bucket(bucketChunks).Get(d[:])
				if v == nil {
					return fmt.Errorf("store: chunk %s of the index was not put", d)
				}
				if r, err := decodeChunk(v); err != nil || r.damaged() {
					return errors.Join(fmt.Errorf("store: chunk %s was found damaged during the ingest: %w", d, blockdev.ErrCorrupt), err)
				}
			}
			return ctx.Err()
		})
		batch = batch[:0]
		return err
	}
	for d := range chunks {
		if _, put := in.chunks[d]; put {
			continue
		}
		if batch = append(batch, d); len(batch) == cap(batch) {
			if err := look(); err != nil {
				return err
			}
		}
	}
	return look()
}

// compareDigests is the order of reference lists.
func compareDigests(a, b blockdev.Digest) int { return bytes.Compare(a[:], b[:]) }

// seal ends the Puts, and is sync.
func (in *Ingest) seal() error {
	in.mu.Lock()
	in.sealed = true
	in.mu.Unlock()
	return in.sync()
}

// sync writes what is buffered and makes the pack durable. gate is held: nobody else
// writes.
func (in *Ingest) sync() error {
	in.mu.Lock()
	if err := in.usableLocked(); err != nil {
		in.mu.Unlock()
		return err
	}
	if in.cur != nil {
		in.writing = append(in.writing, in.cur)
		in.cur = nil
	}
	rest := slices.Clone(in.writing)
	in.mu.Unlock()
	for _, b := range rest {
		if err := in.write(b); err != nil {
			return err
		}
	}
	if err := in.pack.f.Sync(); err != nil {
		return diskError("sync chunks", err)
	}
	return in.s.packs.sync()
}

// record gives every chunk of refs one more reference. What the session has
// put is used where the store has no good copy, and given up elsewhere. old are the
// references of the diff's earlier version, which are dropped next. gate is held, so
// the session's chunks may be read without the lock.
func (in *Ingest) record(c *change, refs []blockdev.Digest, old *freeing) error {
	c.live[in.id]++ // the list
	used := make(map[blockdev.Digest]struct{}, len(in.chunks))
	for _, d := range refs {
		own, mine := in.chunks[d]
		r, ok, err := c.chunk(d)
		if !ok {
			// Its record is gone, as when a bit of the key has flipped.
			if old.had(d) {
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
			return fmt.Errorf("store: chunk %s was found damaged during the ingest: %w", d, blockdev.ErrCorrupt)
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
