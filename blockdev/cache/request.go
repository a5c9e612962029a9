package cache

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// request is chunks or pieces that the Source is asked for.
type request struct {
	blockdev.Request
	c     *shared
	take  blockdev.Deliver
	idle  time.Duration
	timer *time.Timer // ends the request when nothing has come for so long as idle

	got      []bool
	left     int
	returned atomic.Bool
}

// request asks the Source for some chunks or pieces and gives what comes, checked, to take,
// each once and one at a time. It fails if not all has come in the end, or if nothing has
// come for so long as idle: then it ends ctx by cancel. The error is ctx's cause if ctx has
// ended.
func (c *shared) request(ctx context.Context, cancel context.CancelCauseFunc, req blockdev.Request, idle time.Duration, take blockdev.Deliver) error {
	r := &request{Request: req, c: c, take: take, idle: idle, got: make([]bool, len(req.Chunks)), left: len(req.Chunks)}
	r.timer = time.AfterFunc(idle, func() {
		cancel(fmt.Errorf("the source has delivered nothing for %v: %w", idle, blockdev.ErrUnavailable))
	})
	defer r.timer.Stop()
	err := c.cfg.Source.Fetch(ctx, req, r.deliver)
	r.returned.Store(true)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case r.left > 0:
		return fmt.Errorf("the source says that it is done, but %d of %d chunks did not come: %w", r.left, len(r.got), blockdev.ErrUnavailable)
	}
	return nil
}

func (r *request) deliver(i int, data []byte) error {
	if r.returned.Load() {
		return errors.New("delivered after the request had ended")
	}
	if i < 0 || i >= len(r.got) {
		return fmt.Errorf("delivered chunk number %d of a request for %d", i, len(r.got))
	}
	if r.got[i] {
		return nil
	}
	if err := r.Chunks[i].Check(data); err != nil {
		r.c.stats.corrupt.Add(1)
		return fmt.Errorf("diff %v, offset %d: %w", r.Diff, r.Chunks[i].Offset, err)
	}
	r.timer.Reset(r.idle)
	r.got[i] = true
	r.left--
	return r.take(i, data)
}
