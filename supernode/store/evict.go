package store

import (
	"context"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// reserve takes n bytes of the quota, and evicts to get them.
func (s *Store) reserve(ctx context.Context, n int64) error {
	if err := s.fitQuota(); err != nil {
		return err
	}
	if s.tryReserve(n) {
		return nil
	}
	select {
	case s.evicting <- struct{}{}:
		defer func() { <-s.evicting }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		if err := s.fitQuota(); err != nil {
			return err
		}
		if s.tryReserve(n) {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		ok, err := s.evictOne()
		if err != nil {
			return err
		}
		if !ok {
			return s.errQuota()
		}
	}
}

// fitQuota makes the quota what the user allows, or what the disk has if that is
// less now: others fill it, and free it again.
func (s *Store) fitQuota() error {
	free, err := s.freeSpace()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.quota = max(0, s.used+free)
	if s.cfg.Quota > 0 {
		s.quota = min(s.quota, s.cfg.Quota)
	}
	return nil
}

func (s *Store) errQuota() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cfg.Quota <= 0 || s.quota < s.cfg.Quota {
		return fmt.Errorf("store: %w: the disk of %s has %d MiB left for it, and what the store has is in use (%d diffs pinned, %d ingests running); make room on it",
			blockdev.ErrNoSpace, s.cfg.Dir, max(0, s.quota-s.used)>>20, len(s.pins), len(s.sessions))
	}
	return fmt.Errorf("store: %w: the quota of %d MiB is taken by images in use (%d diffs pinned, %d ingests running); raise %s",
		blockdev.ErrNoSpace, s.quota>>20, len(s.pins), len(s.sessions), s.cfg.QuotaKey)
}

func (s *Store) tryReserve(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used+n > s.quota {
		return false
	}
	s.used += n
	return true
}

func (s *Store) unreserve(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used -= n
}

// evictOne removes the least recently used diff that is not pinned, or, if all are,
// one whose pin Config.Yield gives back. False: there is none.
func (s *Store) evictOne() (bool, error) {
	victim, oldest, before := s.victim()
	for oldest < 0 {
		if s.cfg.Yield == nil || !s.cfg.Yield() {
			return false, nil
		}
		victim, oldest, before = s.victim()
	}
	if err := s.remove(victim, true); err != nil {
		return false, fmt.Errorf("evict diff %s: %w", victim, err)
	}
	s.mu.Lock()
	s.stats.evicted++
	s.stats.evictedBytes += max(0, before-s.used)
	s.mu.Unlock()
	s.cfg.Log.Info("evicted a diff to hold the quota", "diff", victim, "lastUsed", time.Unix(0, oldest))
	return true, nil
}

// victim is the diff to evict next, when it was used last, and how much the store
// takes; oldest is negative if all diffs are pinned.
func (s *Store) victim() (id blockdev.Digest, oldest, before int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	oldest = -1
	for d, st := range s.diffs {
		if s.pins[d] == 0 && (oldest < 0 || st.used < oldest) {
			id, oldest = d, st.used
		}
	}
	return id, oldest, s.used
}

// Remove drops a diff and every layer that holds it, and frees the chunks that
// no other diff has. It does not look at pins. A diff that is not there is no
// error.
func (s *Store) Remove(id blockdev.Digest) error { return s.remove(id, false) }

func (s *Store) remove(id blockdev.Digest, unlessPinned bool) error {
	drops, err := s.removeDiff(id, unlessPinned)
	s.dropped(drops)
	return err
}

func (s *Store) removeDiff(id blockdev.Digest, unlessPinned bool) (drops []uint64, err error) {
	s.commit.Lock()
	defer s.commit.Unlock()
	old, err := s.freeable(id)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	st := s.diffs[id]
	if st == nil || (unlessPinned && s.pins[id] > 0) {
		s.mu.Unlock()
		return nil, nil
	}
	// Out of sight first: nobody is given what is about to go.
	delete(s.diffs, id)
	gone := make(map[blockdev.Digest]layerRecord)
	for _, l := range st.layers {
		gone[l] = s.layers[l]
		delete(s.layers, l)
	}
	s.mu.Unlock()
	err = s.update(func(c *change) error {
		for l := range gone {
			if err := c.tx.Bucket(bucketLayers).Delete(l[:]); err != nil {
				return err
			}
		}
		if err := c.replaceDiff(id, old); err != nil {
			return err
		}
		drops = c.drops
		return c.tx.Bucket(bucketDiffs).Delete(id[:])
	})
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.diffs[id] == nil {
			s.diffs[id] = st
			for l, r := range gone {
				s.layers[l] = r
			}
		}
		return nil, err
	}
	return drops, nil
}

// collectOrphans frees records without reference that no ingest holds any more.
func (s *Store) collectOrphans() error {
	s.mu.Lock()
	var todo []blockdev.Digest
	for d := range s.orphans {
		if s.holds[d] == 0 {
			todo = append(todo, d)
		}
	}
	s.mu.Unlock()
	if len(todo) == 0 {
		return nil
	}
	var done []blockdev.Digest
	err := s.update(func(c *change) error {
		for _, d := range todo {
			r, ok, err := c.chunk(d)
			if err != nil {
				if err := c.wantRecount(); err != nil {
					return err
				}
				ok = false
			}
			if ok && r.refs == 0 {
				if !c.doom(d) {
					continue // held again: stays an orphan
				}
				if err := c.deleteChunk(d, r); err != nil {
					return err
				}
			}
			if err := c.tx.Bucket(bucketOrphans).Delete(d[:]); err != nil {
				return err
			}
			done = append(done, d)
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range done {
		delete(s.orphans, d)
	}
	return nil
}
