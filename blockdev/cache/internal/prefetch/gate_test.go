package prefetch

import (
	"testing"
	"testing/synctest"
	"time"
)

// waitAt waits at a gate of other times.
func waitAt(t *testing.T, g *Gate, quiet, giveWay time.Duration) (bool, error) {
	g.quiet, g.giveWay = quiet, giveWay
	return g.Wait(t.Context())
}

// TestPrefetchDoesNotWaitForHungReads: prefetch gives way to demand reads, but not to
// those of a diff for which nothing has come for long.
func TestPrefetchDoesNotWaitForHungReads(t *testing.T) {
	var g Gate
	var hung, alive Reads
	g.Enter(&hung)
	g.Enter(&hung)
	if calm, err := waitAt(t, &g, time.Nanosecond, time.Millisecond); calm || err != nil {
		t.Errorf("prefetch does not give way to reads that have just begun (%v)", err)
	}
	hung.since = hung.since.Add(-hungAfter)
	for range 2 { // also after one of them has given up
		if calm, err := waitAt(t, &g, time.Nanosecond, time.Hour); !calm || err != nil {
			t.Errorf("prefetch gives way to reads that hang (%v)", err)
		}
		g.Leave(&hung)
	}
	g.Enter(&hung)
	hung.since = hung.since.Add(-hungAfter)
	g.Enter(&alive)
	if calm, err := waitAt(t, &g, time.Nanosecond, time.Millisecond); calm || err != nil {
		t.Errorf("prefetch does not give way to reads of another diff (%v)", err)
	}
	g.Leave(&alive)
	g.Came(&hung)
	if calm, err := waitAt(t, &g, time.Nanosecond, time.Millisecond); calm || err != nil {
		t.Errorf("prefetch does not give way to reads for which something has come again (%v)", err)
	}
	g.Leave(&hung)
	if calm, err := waitAt(t, &g, time.Nanosecond, time.Hour); !calm || err != nil {
		t.Errorf("prefetch does not go on when there are no reads (%v)", err)
	}
}

// TestPrefetchWaitsForAStart: as long as a program that starts reads new chunks,
// though they are there, prefetch gives way.
func TestPrefetchWaitsForAStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Gate
		began := time.Now()
		waited := func() time.Duration {
			from := time.Now()
			if calm, err := waitAt(t, &g, 500*time.Millisecond, 10*time.Second); err != nil || !calm {
				t.Fatal(calm, err)
			}
			return time.Since(from)
		}
		if d := waited(); d != 0 {
			t.Errorf("nobody starts, and it waited %v", d)
		}
		g.Starting()
		time.AfterFunc(time.Second, g.Starting)
		waited()
		if d := time.Since(began); d != time.Second+startBusy {
			t.Errorf("prefetch goes on %v after the start's first read, want %v", d, time.Second+startBusy)
		}
		g.Starting()
		if calm, err := waitAt(t, &g, time.Millisecond, time.Second); calm || err != nil || time.Since(began) != 2*time.Second+startBusy {
			t.Errorf("it waits longer than it may: %v, %v, %v", time.Since(began), calm, err)
		}
	})
}
