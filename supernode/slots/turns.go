package slots

import (
	"context"
	"errors"
	"time"
)

// ErrYielded ends a turn of work that has been slow while other work waited.
var ErrYielded = errors.New("its registry sends too slowly, and other layers wait")

// Pace is what work has to do to keep its place while other work waits.
type Pace struct {
	// Rate is in bytes a second.
	Rate int64
	// Turn is for how long it is looked at how fast work is, and so the least time that
	// work has a place.
	Turn time.Duration
}

// Keep returns a context for work that has a place: it ends with the cause ErrYielded if in a
// Turn less than Rate is added to what moved returns, in bytes, and then yields says that
// there is something to yield to. stop ends the context and the look-out.
func (p Pace) Keep(ctx context.Context, moved func() int64, yields func() bool) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(p.Turn)
		defer t.Stop()
		before := moved()
		for {
			select {
			case <-t.C:
			case <-ctx.Done():
				return
			}
			now := moved()
			if float64(now-before) < float64(p.Rate)*p.Turn.Seconds() && yields() {
				cancel(ErrYielded)
				return
			}
			before = now
		}
	}()
	return ctx, func() {
		cancel(nil)
		<-done
	}
}

// Turns calls turn with 0, 1 and so on, until it ends with another error than
// ErrYielded, or with ctx. yielded is called after each turn that did not.
func Turns(ctx context.Context, turn func(ctx context.Context, n int) error, yielded func()) error {
	for n := 0; ; n++ {
		err := turn(ctx, n)
		if ctx.Err() != nil || !errors.Is(err, ErrYielded) {
			return err
		}
		yielded()
	}
}
