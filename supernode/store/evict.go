package store

import (
	"context"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// reserve takes n bytes of the quota, and evicts to get them.
func (s *Store) reserve(ctx context.Context, n int64) error {
	if err := s.space.fit(); err != nil {
		return err
	}
	if s.space.reserve(n) {
		return nil
	}
	select {
	case s.evicting <- struct{}{}:
		defer func() { <-s.evicting }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		if err := s.space.fit(); err != nil {
			return err
		}
		if s.space.reserve(n) {
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
			_, _, pinned := s.catalogue.sizes()
			ingests, _ := s.sessions.count()
			return s.space.exhausted(pinned, ingests)
		}
	}
}

// evictOne removes the least recently used diff that is not pinned, or, if all are,
// one whose pin Config.Yield gives back. False: there is none.
func (s *Store) evictOne() (bool, error) {
	victim, oldest := s.catalogue.victim()
	for oldest < 0 {
		if s.cfg.Yield == nil || !s.cfg.Yield() {
			return false, nil
		}
		victim, oldest = s.catalogue.victim()
	}
	before, _ := s.space.numbers()
	if err := s.remove(victim, true); err != nil {
		return false, fmt.Errorf("evict diff %s: %w", victim, err)
	}
	now, _ := s.space.numbers()
	s.stats.evicted.Add(1)
	s.stats.evictedBytes.Add(max(0, before-now))
	s.cfg.Log.Info("evicted a diff to stay within the quota", "diff", victim, "lastUsed", time.Unix(0, oldest))
	return true, nil
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
	// Out of sight first: nobody is given what is about to go.
	gone, ok := s.catalogue.hide(id, unlessPinned)
	if !ok {
		return nil, nil
	}
	err = s.update(func(c *change) error {
		for l := range gone.layers {
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
		s.catalogue.restore(id, gone)
		return nil, err
	}
	return drops, nil
}

// collectOrphans frees records without reference that no ingest holds any more.
func (s *Store) collectOrphans() error {
	todo := s.holds.loose()
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
	s.holds.settled(done)
	return nil
}
