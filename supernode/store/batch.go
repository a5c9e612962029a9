package store

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

// batchChunks is how many chunks an ingest keeps in memory, and how many records one
// transaction writes: with a large index.db, each is a page of it or two.
const batchChunks = 8192

// A layer with more chunks than that goes into index.db in batches. Each adds to every
// chunk that it has put or found a reference, and to the layer's record in bucket
// unpublished a list of them. Publishing makes these the lists of the diff; if it comes
// to no end, or a diff of many lists is removed, drop takes the references back, list
// by list, also after a crash.

// commitBatch makes a batch of what was put, if there is enough for one.
func (in *Ingest) commitBatch(ctx context.Context) error {
	in.gate.Lock()
	defer in.gate.Unlock()
	in.mu.Lock()
	err := in.usableLocked()
	few := len(in.chunks)+len(in.held) < in.s.cfg.batch
	in.mu.Unlock()
	if err != nil || few {
		return err
	}
	refs := in.batchRefs()
	list, err := in.appendList(ctx, refs)
	if err != nil {
		return err
	}
	if err := in.sync(); err != nil {
		return err
	}
	err = in.s.update(func(c *change) error {
		if err := in.record(c, refs, nil); err != nil {
			return err
		}
		if err := c.putUnpublished(in.id, unpublishedRecord{Lists: append(slices.Clip(in.lists), list)}); err != nil {
			return err
		}
		c.reserved = in.takeReserved()
		c.committed = func() {
			in.lists = append(in.lists, list)
			in.settle(c.reserved)
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	in.releaseHeld()
	return nil
}

// batchRefs are the chunks of the batch that is being made, in order. gate is held, so
// they may be read without the lock.
func (in *Ingest) batchRefs() []blockdev.Digest {
	refs := make([]blockdev.Digest, 0, len(in.chunks)+len(in.held))
	for d := range in.chunks {
		refs = append(refs, d)
	}
	for d := range in.held {
		refs = append(refs, d)
	}
	slices.SortFunc(refs, compareDigests)
	return refs
}

// appendList adds a reference list to the pack, and reserves the room that its chunks
// take in index.db.
func (in *Ingest) appendList(ctx context.Context, refs []blockdev.Digest) (extent, error) {
	list := make([]byte, 0, len(refs)*len(blockdev.Digest{}))
	for _, d := range refs {
		list = append(list, d[:]...)
	}
	e, err := in.append(ctx, list, nil)
	if err != nil {
		return e, err
	}
	return e, in.reserve(ctx, int64(len(refs))*refBytesInDB)
}

func (in *Ingest) takeReserved() int64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.reserved
}

// settle notes that what was put is in index.db, and its room counted there.
func (in *Ingest) settle(reserved int64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.reserved -= reserved
	in.settled = in.size
	clear(in.chunks)
}

// releaseHeld lets go of chunks that the session has references to now.
func (in *Ingest) releaseHeld() {
	in.mu.Lock()
	held := in.held
	in.held = make(map[blockdev.Digest]struct{})
	in.mu.Unlock()
	for d := range held {
		in.s.holds.release(d)
	}
}

func (c *change) putUnpublished(id uint64, r unpublishedRecord) error {
	if err := c.newFormat(); err != nil {
		return err
	}
	return putJSONAt(c.tx.Bucket(bucketUnpublished), packKey(id), r)
}

// newFormat keeps versions from the store that know nothing of batches.
func (c *change) newFormat() error {
	return c.tx.Bucket(bucketMeta).Put(keyFormat, binary.LittleEndian.AppendUint32(nil, formatVersion))
}

// drop takes back the references of an unpublished record, a list at a time, and
// frees what it has.
func (s *Store) drop(id uint64) error {
	for {
		r, ok, err := s.db.unpublished(id)
		if errors.Is(err, blockdev.ErrCorrupt) {
			return s.update(func(c *change) error {
				if err := c.tx.Bucket(bucketUnpublished).Delete(packKey(id)); err != nil {
					return err
				}
				return c.wantRecount()
			})
		}
		if err != nil || !ok {
			return err
		}
		s.at("drop")
		if err := s.dropList(id, r); err != nil {
			return err
		}
	}
}

// dropList drops the last list of a record, and with the first one the record.
func (s *Store) dropList(id uint64, r unpublishedRecord) error {
	var refs []blockdev.Digest
	var list extent
	n, lost := len(r.Lists), false
	if n > 0 {
		list = r.Lists[n-1]
		var err error
		if refs, err = s.packs.readList(list); errors.Is(err, blockdev.ErrCorrupt) {
			lost = true
		} else if err != nil {
			return err
		}
		r.Lists = r.Lists[:n-1]
	}
	end := list.Offset + int64(list.Length)
	return s.update(func(c *change) error {
		if lost {
			if err := c.wantRecount(); err != nil {
				return err
			}
		}
		for _, d := range refs {
			if err := c.unref(d); err != nil {
				return err
			}
		}
		if n > 0 { // the last one of a session may be empty
			c.free(list)
		}
		if r.Index == nil && !r.Ended {
			r.Ended = true
			if st, err := os.Stat(s.packs.path(id)); err == nil && st.Size() > end {
				c.dead = append(c.dead, extent64{id, end, st.Size() - end})
			}
		}
		if len(r.Lists) > 0 {
			return c.putUnpublished(id, r)
		}
		if r.Index != nil {
			c.free(*r.Index)
		}
		return c.tx.Bucket(bucketUnpublished).Delete(packKey(id))
	})
}

// countedTwice says whether all chunks of a diff have a reference of it and one of the
// session that publishes it again. They have not where a bit of a record's key has
// flipped: the session has put that chunk as a new one.
func (in *Ingest) countedTwice(id blockdev.Digest) (bool, error) {
	r, ok, err := in.s.db.diff(id)
	if err != nil || !ok {
		return false, err
	}
	for _, e := range r.lists() {
		refs, err := in.s.packs.readList(e)
		if errors.Is(err, blockdev.ErrCorrupt) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		all := true
		err = in.s.db.view(func(tx *bolt.Tx) error {
			for _, d := range refs {
				want := uint32(2)
				_, put := in.chunks[d]
				if _, held := in.held[d]; put || held { // counted when it is published
					want = 1
				}
				v := tx.Bucket(bucketChunks).Get(d[:])
				if v == nil {
					all = false
					return nil
				}
				if r, err := decodeChunk(v); err != nil || r.refs < want {
					all = false
					return nil
				}
			}
			return nil
		})
		if err != nil || !all {
			return false, err
		}
	}
	return true, nil
}

// dropAll drops what a crash has left.
func (s *Store) dropAll() error {
	ids, err := s.db.allUnpublished()
	for _, id := range ids {
		if err == nil {
			err = s.drop(id)
		}
	}
	return err
}
