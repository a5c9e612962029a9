package uplink

import (
	"context"
	"fmt"
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
	rest := blockdev.NewRest(req, deliver)
	err := u.race(ctx, order, w, func(ctx context.Context, s Supernode, alive func()) error { return u.ask(ctx, s, rest, alive) })
	if refused := rest.Refused(); refused != nil {
		return refused
	}
	return err
}

// ask gets the rest of a request from s.
func (u *Uplink) ask(ctx context.Context, s Supernode, rest *blockdev.Rest, alive func()) error {
	req, take := rest.Ask()
	if refused := rest.Refused(); refused != nil {
		return refused
	}
	began, first := time.Now(), true
	err := s.Fetch(ctx, req, func(k int, data []byte) error {
		if first && req.Priority == blockdev.Demand {
			u.took(time.Since(began))
		}
		first = false
		alive()
		defer alive() // a slow disk here is not the supernode's fault
		return take(k, data)
	})
	refused, left := rest.Refused(), rest.Left()
	switch {
	case refused != nil:
		return refused
	case left == 0:
		return nil
	case err == nil:
		return fmt.Errorf("%d chunks were not delivered: %w", left, blockdev.ErrCorrupt)
	}
	return err
}
