package volume

import (
	"context"
	"errors"
	"time"

	"github.com/shoalfs/shoal/blockdev/cache"
)

// defaultScrub is how often everything on the disk is read and checked, if Config
// does not say.
const defaultScrub = 7 * 24 * time.Hour

// newScrubQueue makes the queue that checks local diffs, one at a time, when there
// is nothing else to do.
func (q *queues) newScrubQueue() *queue {
	return newQueue(q.log, 1, task{
		name:  "scrub",
		note:  func(v *volume) *fetchState { return &v.scrub },
		do:    func(ctx context.Context, v *volume, _ bool) error { return v.diff.Scrub(ctx) },
		hold:  func() bool { return q.prefetches.busy() || q.proofs.busy() },
		final: func(error) bool { return true },
		ended: func(v *volume, err error) {
			switch {
			case errors.Is(err, cache.ErrDamaged):
				q.log.Error("a scrub found damaged chunks; they are fetched again", "diff", v.id, "error", err)
			case errors.Is(err, cache.ErrIncomplete):
				// Found before, and then lost sight of.
				q.log.Warn("a layer is not complete any more; the missing chunks are fetched again", "diff", v.id, "error", err)
				q.refetch(v)
			}
		},
	})
}

// scrubber queues the diffs whose time has come.
func (q *queues) scrubber(interval time.Duration, volumes func() []*volume) {
	t := time.NewTicker(min(interval/8, 10*time.Minute))
	defer t.Stop()
	for {
		for _, v := range volumes() {
			if time.Since(v.diff.Scrubbed()) >= interval {
				_, _ = q.scrubs.add(v, false)
			}
		}
		select {
		case <-t.C:
		case <-q.scrubs.ctx.Done():
			return
		}
	}
}
