package prefetch

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestRate: over time as many bytes come as the limit says, whatever the size of
// requests and however long nothing came before.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &Rate{limit: 1 << 20}
		time.Sleep(time.Hour)
		began, bytes := time.Now(), 0
		for i := range 100 {
			if err := r.wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			n := 10_000 * (1 + i%7)
			r.Came(n)
			bytes += n
		}
		if err := r.wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		want := time.Duration(float64(bytes)/(1<<20)*float64(time.Second)) - rateBurst
		if took := time.Since(began); took < want-time.Millisecond || took > want+time.Millisecond {
			t.Errorf("%d bytes took %v, want %v", bytes, took, want)
		}
		r.Came(1 << 30)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := r.wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a wait goes on when its context has ended: %v", err)
		}
		free := &Rate{}
		free.Came(1 << 30)
		began = time.Now()
		if err := free.wait(t.Context()); err != nil || time.Since(began) != 0 {
			t.Errorf("without a limit: waited %v, %v", time.Since(began), err)
		}
	})
}
