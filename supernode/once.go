package supernode

import (
	"context"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/flight"
)

// progress is what those hear who watch a layer's verification.
type progress = flight.Progress[blockdev.Progress]

// outlives is for work that goes on if nobody waits: what has been fetched is of
// use to the next one, and a node that has given up often asks again.
var outlives = flight.Policy{Outlives: true}

// once runs work for all who ask with the same key at the same time. watch, which
// may be nil, is told where the work is, first of all at once, and not any more
// when once has returned.
func (s *Supernode) once(ctx context.Context, key string, p flight.Policy, watch func(blockdev.Progress), work func(context.Context, *progress) error) error {
	a, err := s.flights.JoinWith(key, p, func() (*progress, flight.Work) {
		state := new(progress)
		return state, func(ctx context.Context) error { return work(ctx, state) }
	})
	if err != nil {
		return err
	}
	if watch != nil {
		defer a.State.Watch(watch)()
	}
	return a.Wait(ctx)
}
