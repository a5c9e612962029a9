package volume

import (
	"context"
	"errors"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
)

// newProofQueue makes the queue that proves the indexes of complete diffs, one at a
// time, when nothing is being prefetched or somebody waits for it.
func (q *queues) newProofQueue() *queue {
	return newQueue(q.log, 1, task{
		name: "proof",
		note: func(v *volume) *fetchState { return &v.proof },
		do:   func(ctx context.Context, v *volume, hurry bool) error { return v.diff.Prove(ctx, hurry) },
		hold: func() bool { return q.prefetches.busy() },
		final: func(err error) bool {
			return errors.Is(err, blockdev.ErrQuarantined) || errors.Is(err, cache.ErrIncomplete) || errors.Is(err, cache.ErrDamaged)
		},
		ended: func(v *volume, err error) {
			// What is missing for another reason was taken away on purpose.
			if errors.Is(err, cache.ErrDamaged) {
				q.refetch(v)
			}
			q.scrubs.kick() // they wait for proofs, too
		},
	})
}

// prove has a diff proven in the background. What the queue refuses is being
// removed or closed.
func (q *queues) prove(v *volume) {
	if v.diff.Proof() == cache.Unproven {
		_, _ = q.proofs.add(v, false)
	}
}
