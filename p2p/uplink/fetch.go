package uplink

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// Fetch implements blockdev.Source.
func (u *Uplink) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	w := way{after: u.hedge()}
	switch req.Priority {
	case blockdev.Demand:
	case blockdev.Startup:
		w.after = startupHedge
	default:
		w = way{after: prefetchGiveUp, instead: true}
	}
	order := u.order(req.Diff, w.after)
	if len(order) == 1 {
		return order[0].Fetch(ctx, req, deliver)
	}
	f := &fetch{u: u, req: req, got: make([]bool, len(req.Chunks)), left: len(req.Chunks), deliver: deliver}
	err := u.race(ctx, order, w, f.from)
	if f.failed != nil {
		return f.failed
	}
	return err
}

// fetch is one call of Fetch.
type fetch struct {
	u       *Uplink
	req     blockdev.Request
	deliver blockdev.Deliver

	mu     sync.Mutex // held while deliver runs: one call at a time
	got    []bool     // chunks that were delivered
	left   int        // how many were not
	failed error      // of deliver, and none of the sender's making
}

// wanted returns the positions of what was not delivered yet. An error is deliver's.
func (f *fetch) wanted() (at []int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, got := range f.got {
		if !got {
			at = append(at, i)
		}
	}
	return at, f.failed
}

// from gets what is left from s.
func (f *fetch) from(ctx context.Context, s Supernode, alive func()) error {
	at, err := f.wanted()
	if err != nil {
		return err
	}
	req := f.req
	req.Chunks = make([]blockdev.Chunk, len(at))
	for k, i := range at {
		req.Chunks[k] = f.req.Chunks[i]
	}
	began, first := time.Now(), true
	err = s.Fetch(ctx, req, func(k int, data []byte) error {
		if first && req.Priority == blockdev.Demand {
			f.u.took(time.Since(began))
		}
		first = false
		alive()
		defer alive() // a slow disk here is not the supernode's fault
		return f.take(at[k], data)
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.failed != nil:
		return f.failed
	case f.left == 0:
		return nil
	case err == nil:
		return fmt.Errorf("%d chunks were not delivered: %w", f.left, blockdev.ErrCorrupt)
	}
	return err
}

// take delivers a chunk, unless another supernode has been faster.
func (f *fetch) take(i int, data []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed != nil {
		return f.failed
	}
	if f.got[i] {
		// Nobody else looks at it, and nil means that it is right.
		if blockdev.Sum(data) != f.req.Chunks[i].Digest {
			return fmt.Errorf("a chunk that has come already comes with wrong bytes: %w", blockdev.ErrCorrupt)
		}
		return nil
	}
	err := f.deliver(i, data)
	switch {
	case err == nil:
		f.got[i] = true
		f.left--
	case !errors.Is(err, blockdev.ErrCorrupt):
		f.failed = err
	}
	return err
}
