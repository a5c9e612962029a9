package slots

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestPace: work keeps its place while it is fast enough, or nothing waits.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int64
		var waits atomic.Bool
		p := Pace{Rate: 100, Turn: 10 * time.Second}
		ctx, stop := p.Keep(t.Context(), n.Load, waits.Load)
		defer stop()
		pass := func(add int64) {
			n.Add(add)
			time.Sleep(p.Turn)
			synctest.Wait()
		}
		pass(0)
		pass(999)
		waits.Store(true)
		pass(1000)
		if err := ctx.Err(); err != nil {
			t.Fatalf("it has lost its place: %v", context.Cause(ctx))
		}
		pass(999)
		if err := context.Cause(ctx); !errors.Is(err, ErrYielded) {
			t.Errorf("it was slow while others waited: %v", err)
		}
	})
}

// TestTurns: work that yields goes on, until it is done or nothing wants it any more.
func TestTurns(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var yields []int
	turns := 0
	err := Turns(ctx, func(_ context.Context, n int) error {
		turns++
		if n == 2 {
			return context.DeadlineExceeded
		}
		return ErrYielded
	}, func() { yields = append(yields, turns) })
	if !errors.Is(err, context.DeadlineExceeded) || len(yields) != 2 || turns != 3 {
		t.Errorf("%v after %d turns, yields after %v", err, turns, yields)
	}
	turns = 0
	err = Turns(ctx, func(context.Context, int) error {
		if turns++; turns == 5 {
			cancel()
		}
		return ErrYielded
	}, func() {})
	if turns != 5 || err == nil {
		t.Errorf("%v after %d turns", err, turns)
	}
}
