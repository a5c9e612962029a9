package volume

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/shoalfs/shoal/blockdev/cache"
)

// queues are what is done with volumes in the background. Each queue waits for what a
// caller waits for: scrubs for proofs, proofs for prefetches. What one finds damaged,
// another fetches again.
type queues struct {
	log                        *slog.Logger
	mounts                     *mounter
	prefetches, proofs, scrubs *queue
}

func newQueues(cfg Config, mounts *mounter) *queues {
	q := &queues{log: cfg.Log, mounts: mounts}
	q.prefetches, q.proofs, q.scrubs = q.newPrefetchQueue(cfg.PrefetchDiffs), q.newProofQueue(), q.newScrubQueue()
	return q
}

func (q *queues) all() []*queue { return []*queue{q.prefetches, q.proofs, q.scrubs} }

// close ends all of them; see queue.close.
func (q *queues) close(vols []*volume) {
	for _, each := range q.all() {
		each.close(vols)
	}
}

// stop keeps all queues off a volume, or none.
func (q *queues) stop(ctx context.Context, v *volume) error {
	for _, each := range q.all() {
		if err := each.drop(ctx, v); err != nil {
			q.allow(v)
			return err
		}
	}
	return nil
}

// allow undoes stop.
func (q *queues) allow(v *volume) {
	for _, each := range q.all() {
		each.allow(v)
	}
}

// newPrefetchQueue makes the queue that fetches diffs.
func (q *queues) newPrefetchQueue(most int) *queue {
	return newQueue(q.log, most, task{
		name:  "prefetch",
		note:  func(v *volume) *fetchState { return &v.fetch },
		do:    func(ctx context.Context, v *volume, _ bool) error { return v.diff.Prefetch(ctx) },
		hold:  func() bool { return false },
		final: func(error) bool { return false },
		ended: func(v *volume, err error) {
			if err == nil {
				q.mounts.refresh(v)
				q.mounts.match(q.prefetches.ctx, v)
				q.prove(v)
				if v.diff.Completed() && !v.diff.Complete() {
					q.refetch(v) // damage was found just before the attempt ended
				}
			}
			q.proofs.kick() // they wait until nothing is being fetched
			q.scrubs.kick()
		},
	})
}

// refetch brings back what was found damaged.
func (q *queues) refetch(v *volume) {
	v.setStale()
	_, _ = q.prefetches.add(v, false) // refused: it is being removed, or closed
}

// refetchAndWait brings back what Verify has dropped, which is done in any case;
// with repair it is waited for.
func (q *queues) refetchAndWait(ctx context.Context, v *volume, in *cache.Inspection, repair bool) {
	if in.DamagedChunks == 0 {
		return
	}
	q.refetch(v)
	if !repair {
		return
	}
	if err := q.prefetches.await(ctx, v, func() {}); err != nil {
		f := &in.Findings[0] // Verify looks at the chunks first
		f.Problem += fmt.Sprintf("; the chunks cannot be fetched now: %v", err)
	}
}
