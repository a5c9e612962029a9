package room

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
func (r *Room) evict() *eviction {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.evicting != nil {
		return r.evicting
	}
	if r.makeRoom == nil || time.Since(r.evictedNone) < makeRoomPause {
		return nil
	}
	e, makeRoom := &eviction{done: make(chan struct{})}, r.makeRoom
	r.evicting = e
	r.wg.Go(func() {
		freed := makeRoom(r.life)
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.evicting = nil; !freed {
			r.evictedNone = time.Now()
		}
		e.freed = freed
		close(e.done)
	})
	return e
}

// wait returns nil when try does, which it calls when all is counted. Between its
// attempts diffs that nobody uses are removed.
func (r *Room) wait(ctx context.Context, try func() error) error {
	if r.quota > 0 {
		select {
		case <-r.counted:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for {
		err := try()
		if !errors.Is(err, blockdev.ErrNoSpace) {
			return err
		}
		e := r.evict()
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
