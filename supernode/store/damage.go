package store

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/shoalfs/shoal/blockdev"
)

// damageQueue collects damaged chunks, so that many of them at once, as when a
// disk dies, are looked for in one pass over the reference lists.
type damageQueue struct {
	scan sync.Mutex // held by the one caller that scans; others wait, and find theirs done

	marks atomic.Int64 // goes up before any are marked

	mu      sync.Mutex
	pending map[blockdev.Digest]extent
}

// damaged marks chunks, so that the next Put of one stores it again, and forgets the
// layers that have them. The values are where the damaged bytes are; the zero extent
// if the record itself is unreadable, or gone.
func (s *Store) damaged(chunks map[blockdev.Digest]extent) {
	q := &s.damage
	q.mu.Lock()
	if q.pending == nil {
		q.pending = make(map[blockdev.Digest]extent)
	}
	maps.Copy(q.pending, chunks)
	q.mu.Unlock()

	q.scan.Lock()
	defer q.scan.Unlock()
	q.mu.Lock()
	todo := q.pending
	q.pending = nil
	q.mu.Unlock()
	if len(todo) == 0 {
		return // another scan has done it
	}
	s.stats.damaged.Add(int64(len(todo)))
	q.marks.Add(1)
	err := s.update(func(c *change) error {
		for d, at := range todo {
			if err := c.markDamaged(d, at); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		s.cfg.Log.Error("store: cannot mark damaged chunks", "chunks", len(todo), "error", err)
	}
	for _, id := range s.catalogue.ids() {
		lists, err := s.refsOf(id)
		if err != nil {
			continue
		}
		for d := range todo {
			has := slices.ContainsFunc(lists, func(refs []blockdev.Digest) bool {
				_, has := slices.BinarySearchFunc(refs, d, compareDigests)
				return has
			})
			if has {
				s.cfg.Log.Error("store: a chunk is damaged on disk; its layer is fetched again on request", "chunk", d, "diff", id)
				s.forgetLayers(id)
				break
			}
		}
	}
}

// markDamaged marks a chunk that still is where damage was found.
func (c *change) markDamaged(d blockdev.Digest, at extent) error {
	r, ok, err := c.chunk(d)
	if err != nil || !ok && at == (extent{}) {
		// Where it was is unknown, and how many refer to it.
		if err := c.wantRecount(); err != nil {
			return err
		}
		return c.putChunk(d, lostChunk(manyRefs))
	}
	if !ok || r.extent != at || r.lost() { // moved, evicted, or marked already
		return nil
	}
	if err := c.dropDue(dueKey(r.extent)); err != nil {
		return err
	}
	r.flags = r.flags&^flagDue | flagDamaged
	return c.putChunk(d, r)
}

// forgetLayers makes the layers of a diff unknown, so that they are ingested
// again. The good chunks stay, for callers that read them and for that ingest.
func (s *Store) forgetLayers(id blockdev.Digest) {
	layers := s.catalogue.forget(id)
	if len(layers) == 0 {
		return
	}
	err := s.update(func(c *change) error {
		for _, l := range layers {
			if err := c.tx.Bucket(bucketLayers).Delete(l[:]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		s.cfg.Log.Error("store: cannot remove the layer records of a damaged diff", "diff", id, "error", err)
	}
}

// recount makes reference counts, live counts and free space right from the
// diffs' reference lists alone. It runs at Open, after damage only.
func (s *Store) recount() error {
	s.cfg.Log.Warn("store: counting references again after damage", "dir", s.cfg.Dir)
	refs := make(map[blockdev.Digest]uint32)
	for _, id := range s.catalogue.ids() {
		lists, err := s.refsOf(id)
		if err != nil {
			return err
		}
		if lists == nil {
			if err := s.dropDiff(id); err != nil {
				return err
			}
			continue
		}
		for _, d := range slices.Concat(lists...) {
			refs[d]++
		}
	}
	return s.update(func(c *change) error {
		live := make(map[uint64][]extent64)
		add := func(e extent) {
			live[e.Pack] = append(live[e.Pack], extent64{e.Pack, e.Offset, int64(e.Length)})
		}
		if err := c.recountChunks(refs, add); err != nil {
			return err
		}
		for _, id := range s.catalogue.ids() {
			r, ok, err := getDiff(c.tx, id)
			if err != nil || !ok {
				return err
			}
			add(r.Index)
			for _, e := range r.lists() {
				add(e)
			}
		}
		if err := c.recountPacks(live); err != nil {
			return err
		}
		// No diff has what these count.
		if err := c.emptyBucket(bucketUnpublished); err != nil {
			return err
		}
		return c.tx.Bucket(bucketMeta).Delete(keyRecount)
	})
}

// dropDiff removes a diff's records; the recount frees what it had.
func (s *Store) dropDiff(id blockdev.Digest) error {
	s.forgetLayers(id)
	s.catalogue.hide(id, false)
	return s.update(func(c *change) error { return c.tx.Bucket(bucketDiffs).Delete(id[:]) })
}

func (c *change) recountChunks(refs map[blockdev.Digest]uint32, live func(extent)) error {
	b := c.tx.Bucket(bucketChunks)
	puts := make(map[blockdev.Digest][]byte)
	raw := make(map[blockdev.Digest]chunkRecord) // still to be compressed
	var odd [][]byte
	err := b.ForEach(func(k, v []byte) error {
		d, err := toDigest(k)
		if err != nil {
			odd = append(odd, bytes.Clone(k))
			return nil
		}
		if refs[d] == 0 {
			puts[d] = nil
			return nil
		}
		r, err := decodeChunk(v)
		if err != nil {
			r = lostChunk(0)
		}
		if !r.lost() {
			live(r.extent)
		}
		if r.flags&flagDue != 0 {
			raw[d] = r
		}
		if r.refs != refs[d] {
			r.refs = refs[d]
			puts[d] = r.encode()
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, k := range odd {
		if err := b.Delete(k); err != nil {
			return err
		}
	}
	for d, v := range puts {
		if v == nil {
			err = b.Delete(d[:])
		} else {
			err = b.Put(d[:], v)
		}
		if err != nil {
			return err
		}
	}
	if err := c.emptyBucket(bucketDue); err != nil {
		return err
	}
	c.due -= c.s.smaller.due.Load()
	for d, r := range raw {
		if err := c.addDue(d, r); err != nil {
			return err
		}
	}
	return nil
}

func (c *change) emptyBucket(name []byte) error {
	if err := c.tx.DeleteBucket(name); err != nil && !errors.Is(err, bolterrors.ErrBucketNotFound) {
		return err
	}
	_, err := c.tx.CreateBucket(name)
	return err
}

// recountPacks sets the live counts and frees everything between live extents.
func (c *change) recountPacks(live map[uint64][]extent64) error {
	if err := c.emptyBucket(bucketPacks); err != nil {
		return err
	}
	for id, list := range live {
		c.live[id] = int64(len(list))
		var end int64
		for _, e := range merge(list, nil) {
			if e.offset > end {
				c.dead = append(c.dead, extent64{id, end, e.offset - end})
			}
			end = max(end, e.offset+e.length) // they may overlap where a diff's record is damaged
		}
		if st, err := os.Stat(c.s.packs.path(id)); err == nil && st.Size() > end {
			c.dead = append(c.dead, extent64{id, end, st.Size() - end})
		}
	}
	return nil
}
