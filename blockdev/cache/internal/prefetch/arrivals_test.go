package prefetch

import (
	"testing"
	"time"
)

// TestArrivals: a read waits while startup chunks keep coming, but not for ever.
func TestArrivals(t *testing.T) {
	var a Arrivals
	began := time.Now()
	const ms = time.Millisecond
	for _, x := range []struct{ last, now, want time.Duration }{
		{-60 * ms, 50 * ms, 0},
		{0, 50 * ms, 0},
		{30 * ms, 50 * ms, 30 * ms},
		{480 * ms, 490 * ms, 10 * ms},
		{500 * ms, 500 * ms, 0},
	} {
		a.Note(began.Add(x.last))
		if got := a.Patience(began.Add(x.now), began, 50*ms); got != x.want {
			t.Errorf("chunks came %v after the read began, it is %v: it waits for %v more, not %v", x.last, x.now, got, x.want)
		}
	}
}
