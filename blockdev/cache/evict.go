package cache

import (
	"context"
	"errors"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// eviction is one call of makeRoom.
type eviction struct {
	done  chan struct{}
	freed bool // set before done is closed
}

// evict has makeRoom called, unless that is under way. If it returns nil, then nothing
// can be removed.
func (s *space) evict() *eviction {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.evicting != nil {
		return s.evicting
	}
	if s.makeRoom == nil || time.Since(s.evictedNone) < makeRoomPause {
		return nil
	}
	e, makeRoom := &eviction{done: make(chan struct{})}, s.makeRoom
	s.evicting = e
	s.wg.Go(func() {
		freed := makeRoom(s.life)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.evicting = nil; !freed {
			s.evictedNone = time.Now()
		}
		e.freed = freed
		close(e.done)
	})
	return e
}

// wait returns nil when try does, which it calls when all is counted. Between its
// attempts diffs that nobody uses are removed.
func (s *space) wait(ctx context.Context, try func() error) error {
	if s.quota > 0 {
		select {
		case <-s.counted:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for {
		err := try()
		if !errors.Is(err, blockdev.ErrNoSpace) {
			return err
		}
		e := s.evict()
		if e == nil {
			return err
		}
		select {
		case <-e.done:
			if !e.freed {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
