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
func (m *Manager) newScrubQueue() *queue {
	return newQueue(m.cfg.Log, 1, task{
		name:  "scrub",
		note:  func(v *volume) *fetchState { return &v.scrub },
		do:    func(ctx context.Context, v *volume, _ bool) error { return v.diff.Scrub(ctx) },
		hold:  func() bool { return m.queue.busy() || m.proofs.busy() },
		final: func(error) bool { return true },
		ended: func(v *volume, err error) {
			switch {
			case errors.Is(err, cache.ErrDamaged):
				m.cfg.Log.Error("a scrub found damaged chunks; they are fetched again", "diff", v.id, "error", err)
			case errors.Is(err, cache.ErrIncomplete):
				// Found before, and then lost sight of.
				m.cfg.Log.Warn("a layer is not complete any more; the missing chunks are fetched again", "diff", v.id, "error", err)
				m.refetch(v)
			}
		},
	})
}

// scrubber queues the diffs whose time has come.
func (m *Manager) scrubber(ctx context.Context) {
	t := time.NewTicker(min(m.cfg.ScrubInterval/8, 10*time.Minute))
	defer t.Stop()
	for {
		for _, v := range m.volumes() {
			if time.Since(v.diff.Scrubbed()) >= m.cfg.ScrubInterval {
				_, _ = m.scrubs.add(v, false)
			}
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}
