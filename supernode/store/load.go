package store

import (
	"encoding/binary"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

var keyRecount = []byte("recount")

// load reads what is kept in memory and finishes what a crash interrupted.
func (s *Store) load() error {
	recount := false
	err := s.update(func(c *change) error {
		for _, b := range allBuckets() {
			if _, err := c.tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		meta := c.tx.Bucket(bucketMeta)
		switch v := meta.Get(keyFormat); {
		case v == nil:
			if err := meta.Put(keyFormat, binary.LittleEndian.AppendUint32(nil, firstFormat)); err != nil {
				return err
			}
		case len(v) != 4 || binary.LittleEndian.Uint32(v) < firstFormat || binary.LittleEndian.Uint32(v) > formatVersion:
			return fmt.Errorf("store: %s has format %x, and this version reads formats up to %d: %w: start the version that wrote it, or delete this directory, and all layers are fetched again", s.cfg.Dir, v, formatVersion, blockdev.ErrUnsupported)
		}
		recount = meta.Get(keyRecount) != nil
		return s.loadRecords(c)
	})
	if err != nil {
		return err
	}
	if recount {
		if err := s.recount(); err != nil {
			return err
		}
	}
	if err := s.loadPacks(); err != nil {
		return err
	}
	if err := s.dropAll(); err != nil {
		return err
	}
	if err := s.collectOrphans(); err != nil {
		return err
	}
	if err := s.space.fit(); err != nil {
		return err
	}
	if _, quota := s.space.numbers(); quota < s.cfg.Quota {
		s.cfg.Log.Warn("the quota is larger than the disk; using the size of the disk", "key", s.cfg.QuotaKey, "quota", s.cfg.Quota, "disk", quota)
	}
	return s.shrink()
}

// loadRecords fills diffs, layers, orphans and due, and drops what does not parse.
func (s *Store) loadRecords(c *change) error {
	var bad [][2][]byte
	drop := func(bucket, key []byte, err error) {
		s.cfg.Log.Error("store: dropping a damaged record", "bucket", string(bucket), "key", fmt.Sprintf("%x", key), "error", err)
		bad = append(bad, [2][]byte{bucket, append([]byte(nil), key...)})
	}
	cat := s.catalogue
	now := cat.now().Unix()
	err := c.tx.Bucket(bucketDiffs).ForEach(func(k, v []byte) error {
		var r diffRecord
		id, err := toDigest(k)
		if err == nil {
			err = decodeJSON(v, &r)
		}
		if err != nil {
			// Its references are unknown now: count them all again.
			drop(bucketDiffs, k, err)
			return c.wantRecount()
		}
		// Of what a clock that was ahead has left, all is used now.
		cat.diffs[id] = &diffState{used: max(0, min(r.Used, now)) * int64(time.Second)}
		return nil
	})
	if err != nil {
		return err
	}
	err = c.tx.Bucket(bucketLayers).ForEach(func(k, v []byte) error {
		var r layerRecord
		d, err := toDigest(k)
		if err == nil {
			err = decodeJSON(v, &r)
		}
		if err == nil && cat.diffs[r.DiffID] == nil {
			err = fmt.Errorf("diff %s: %w", r.DiffID, blockdev.ErrNotFound)
		}
		if err != nil {
			drop(bucketLayers, k, err)
			return nil
		}
		cat.layers[d] = r
		cat.diffs[r.DiffID].layers = append(cat.diffs[r.DiffID].layers, d)
		return nil
	})
	if err != nil {
		return err
	}
	err = c.tx.Bucket(bucketOrphans).ForEach(func(k, _ []byte) error {
		d, err := toDigest(k)
		if err != nil {
			drop(bucketOrphans, k, err)
			return nil
		}
		s.holds.orphan(d)
		return nil
	})
	if err != nil {
		return err
	}
	err = c.tx.Bucket(bucketDue).ForEach(func(_, v []byte) error {
		s.smaller.due.Add(dueLength(v))
		return nil
	})
	if err != nil {
		return err
	}
	for _, b := range bad {
		if err := c.tx.Bucket(b[0]).Delete(b[1]); err != nil {
			return err
		}
	}
	return nil
}

// loadPacks deletes packs that no transaction has named, frees what was to be
// freed, and adds up the disk use.
func (s *Store) loadPacks() error {
	known := make(map[uint64]int64)
	var dead []extent64
	err := s.db.view(func(tx *bolt.Tx) error {
		if err := tx.Bucket(bucketPacks).ForEach(func(k, _ []byte) error {
			if len(k) == 8 {
				known[binary.BigEndian.Uint64(k)] = 0
			}
			return nil
		}); err != nil {
			return err
		}
		return tx.Bucket(bucketDead).ForEach(func(k, v []byte) error {
			if len(k) == 16 && len(v) == 8 {
				dead = append(dead, extent64{
					pack:   binary.BigEndian.Uint64(k),
					offset: int64(binary.BigEndian.Uint64(k[8:])),
					length: int64(binary.LittleEndian.Uint64(v)),
				})
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	ids, err := s.packs.list()
	if err != nil {
		return err
	}
	for _, id := range ids {
		s.sessions.nextPack = max(s.sessions.nextPack, id+1)
		if _, ok := known[id]; !ok {
			if err := s.packs.remove(id); err != nil {
				return err
			}
		}
	}
	for id := range known {
		s.sessions.nextPack = max(s.sessions.nextPack, id+1)
	}
	s.packs.punchAll(dead)
	s.space.recount(known, 0)
	return nil
}

// shrink evicts until the quota holds, as after the user has lowered it.
func (s *Store) shrink() error {
	for {
		used, quota := s.space.numbers()
		if used <= quota {
			return nil
		}
		ok, err := s.evictOne()
		if err != nil {
			return err
		}
		if !ok {
			s.cfg.Log.Warn("the store is above its quota, and all of its diffs are pinned", "key", s.cfg.QuotaKey, "quota", quota, "used", used)
			return nil
		}
	}
}

func toDigest(k []byte) (blockdev.Digest, error) {
	var d blockdev.Digest
	if len(k) != len(d) {
		return d, fmt.Errorf("key of %d bytes in index.db: %w", len(k), blockdev.ErrCorrupt)
	}
	copy(d[:], k)
	return d, nil
}
