package store

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

// change is one write transaction and what it frees. Disk space is freed only
// after the commit.
type change struct {
	s      *Store
	tx     *bolt.Tx
	live   map[uint64]int64 // pack -> difference of its live extents
	dead   []extent64
	gone   []uint64 // packs without a live extent
	due    int64    // difference of the raw bytes still to be compressed
	doomed []blockdev.Digest
	drops  []uint64 // unpublished records that the caller drops after the commit
	// reserved bytes of an ingest become bytes of its pack with this change.
	reserved int64
	// committed, if set, is called after the commit and before anything is
	// freed: a reader that looks for a chunk from then on must not find the old place.
	committed func()
}

// extent64 is a range of a pack, possibly many extents long.
type extent64 struct {
	pack           uint64
	offset, length int64
}

// update runs f in a write transaction and frees what it has freed.
func (s *Store) update(f func(c *change) error) error {
	c := &change{s: s, live: make(map[uint64]int64)}
	punched := s.packs.noted()
	err := s.db.guard(func() error {
		return s.db.Update(func(tx *bolt.Tx) error {
			c.tx = tx
			for _, e := range punched {
				if err := tx.Bucket(bucketDead).Delete(deadKey(e.Pack, e.Offset)); err != nil {
					return err
				}
			}
			if err := f(c); err != nil {
				return err
			}
			return c.finish()
		})
	})
	s.holds.spare(c.doomed)
	if err != nil {
		s.packs.note(punched)
		return mapClosed(diskErrorOnly(err))
	}
	if c.committed != nil {
		c.committed()
	}
	s.reclaim(c)
	return nil
}

// diskErrorOnly makes a full disk testable and leaves other errors alone.
func diskErrorOnly(err error) error {
	if isFull(err) {
		return diskError("write index.db", err)
	}
	return err
}

func (c *change) chunk(d blockdev.Digest) (chunkRecord, bool, error) {
	v := c.tx.Bucket(bucketChunks).Get(d[:])
	if v == nil {
		return chunkRecord{}, false, nil
	}
	r, err := decodeChunk(v)
	return r, true, err
}

func (c *change) putChunk(d blockdev.Digest, r chunkRecord) error {
	return c.tx.Bucket(bucketChunks).Put(d[:], r.encode())
}

// unref takes one reference from a chunk and frees it with the last one, unless
// a running ingest holds it.
func (c *change) unref(d blockdev.Digest) error {
	r, ok, err := c.chunk(d)
	if err != nil {
		return c.wantRecount()
	}
	if !ok {
		return nil
	}
	if r.refs > 0 {
		r.refs--
	}
	if r.refs > 0 {
		return c.putChunk(d, r)
	}
	if !c.doom(d) {
		if err := c.tx.Bucket(bucketOrphans).Put(d[:], nil); err != nil {
			return err
		}
		c.s.holds.orphan(d)
		return c.putChunk(d, r)
	}
	return c.deleteChunk(d, r)
}

func (c *change) deleteChunk(d blockdev.Digest, r chunkRecord) error {
	if err := c.freeChunk(r); err != nil {
		return err
	}
	return c.tx.Bucket(bucketChunks).Delete(d[:])
}

// freeChunk gives up the place of a chunk.
func (c *change) freeChunk(r chunkRecord) error {
	if r.lost() {
		return nil
	}
	c.free(r.extent)
	if r.flags&flagDue == 0 {
		return nil
	}
	return c.dropDue(dueKey(r.extent))
}

// doom announces that d is about to be deleted, so that no ingest counts on it
// from now on. False: one does already.
func (c *change) doom(d blockdev.Digest) bool {
	if !c.s.holds.doom(d) {
		return false
	}
	c.doomed = append(c.doomed, d)
	return true
}

// free gives up a live extent.
func (c *change) free(e extent) {
	c.live[e.Pack]--
	c.discard(e)
}

// discard gives up an extent that was never counted as live.
func (c *change) discard(e extent) {
	if e.Length > 0 {
		c.dead = append(c.dead, extent64{e.Pack, e.Offset, int64(e.Length)})
	}
}

// wantRecount notes that reference counts cannot be trusted; the next Open
// counts them again. Until then chunks may stay longer than they need to.
func (c *change) wantRecount() error {
	return c.tx.Bucket(bucketMeta).Put(keyRecount, []byte{1})
}

func (c *change) putJSON(bucket []byte, key blockdev.Digest, v any) error {
	return putJSONAt(c.tx.Bucket(bucket), key[:], v)
}

func putJSONAt(bucket *bolt.Bucket, key []byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return bucket.Put(key, b)
}

// diff returns the record of a diff.
func getDiff(tx *bolt.Tx, id blockdev.Digest) (diffRecord, bool, error) {
	var r diffRecord
	v := tx.Bucket(bucketDiffs).Get(id[:])
	if v == nil {
		return r, false, nil
	}
	return r, true, decodeJSON(v, &r)
}

// finish brings the packs' counts of live extents up to date and writes down
// what is to be freed after the commit.
func (c *change) finish() error {
	b := c.tx.Bucket(bucketPacks)
	gone := make(map[uint64]bool)
	for id, n := range c.live {
		if v := b.Get(packKey(id)); len(v) == 8 {
			n += int64(binary.LittleEndian.Uint64(v))
		}
		if n > 0 {
			if err := b.Put(packKey(id), binary.LittleEndian.AppendUint64(nil, uint64(n))); err != nil {
				return err
			}
			continue
		}
		if err := b.Delete(packKey(id)); err != nil {
			return err
		}
		gone[id] = true
		c.gone = append(c.gone, id)
	}
	c.dead = merge(c.dead, gone)
	for _, e := range c.dead {
		if err := c.tx.Bucket(bucketDead).Put(deadKey(e.pack, e.offset), binary.LittleEndian.AppendUint64(nil, uint64(e.length))); err != nil {
			return err
		}
	}
	return nil
}

// merge joins neighbours, so that whole blocks become free, and leaves out packs
// that are deleted anyway.
func merge(in []extent64, gone map[uint64]bool) []extent64 {
	slices.SortFunc(in, func(a, b extent64) int {
		if a.pack != b.pack {
			if a.pack < b.pack {
				return -1
			}
			return 1
		}
		return int(min(1, max(-1, a.offset-b.offset)))
	})
	var out []extent64
	for _, e := range in {
		if gone[e.pack] {
			continue
		}
		if n := len(out); n > 0 && out[n-1].pack == e.pack && out[n-1].offset+out[n-1].length == e.offset {
			out[n-1].length += e.length
			continue
		}
		out = append(out, e)
	}
	return out
}

// reclaim frees disk space after a commit.
func (s *Store) reclaim(c *change) {
	for _, id := range c.gone {
		if err := s.packs.remove(id); err != nil {
			s.cfg.Log.Error("store: cannot delete an empty pack", "pack", fmt.Sprintf("%016x", id), "error", err)
		}
	}
	s.packs.punchAll(c.dead)
	touched := make(map[uint64]int64)
	for _, id := range c.gone {
		touched[id] = 0
	}
	for _, e := range c.dead {
		touched[e.pack] = 0
	}
	for id := range c.live {
		touched[id] = 0
	}
	s.space.recount(touched, c.reserved)
	s.smaller.due.Add(c.due)
	if c.due > 0 {
		s.smaller.wakeUp()
	}
}
