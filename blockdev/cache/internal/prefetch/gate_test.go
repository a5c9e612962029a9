package prefetch

import (
	"os"
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

// TestCrowded: where containers start and the processors have too much to do, one request
// of prefetch, and one portion of a proof, goes out in each pause; none that a caller
// waits for is put off.
func TestCrowded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busy := true
		p := New(time.Millisecond, time.Second, func() int64 { return 1 << 20 }, 0)
		p.Gate.pressed = func() bool { return busy }
		took := func(hurry bool) time.Duration {
			began := time.Now()
			if _, err := p.Next(t.Context(), hurry); err != nil {
				t.Fatal(err)
			}
			next := time.Since(began)
			began = time.Now()
			if err := NewRest(&p.Gate, func() bool { return hurry }, 0).Wait(t.Context(), restBytes); err != nil {
				t.Fatal(err)
			}
			if rest := time.Since(began); rest != next {
				t.Errorf("a proof waits %v, prefetch %v", rest, next)
			}
			return next
		}
		check := func(what string, hurry bool, want time.Duration) {
			t.Helper()
			if got := took(hurry); got != want {
				t.Errorf("%s: put off by %v, want %v", what, got, want)
			}
		}
		check("no container has started", false, 0)
		p.Gate.Expect()
		time.Sleep(time.Second)
		check("a container starts", false, time.Second)
		check("a caller waits", true, 0)
		done := p.Gate.Hurry()
		check("a caller waits for another layer", false, 0)
		done()
		check("that caller has what it waited for", false, time.Second)
		busy = false
		check("the processors have time", false, 0)
		busy = true
		time.Sleep(crowdedFor)
		check("the start is long ago", false, 0)
		putOff := 0
		for range 6 * 60 {
			p.Gate.Expect()
			time.Sleep(time.Second)
			if p.Gate.crowded() > 0 {
				putOff++
			}
		}
		if putOff < 2*60 || putOff > 4*60 {
			t.Errorf("where containers start all the time, put off in %d of 360 seconds", putOff)
		}
	})
}

// TestCrowdedAfterALoneStart: the time in which requests are put off begins when the first
// one is, and not when a container starts that has all the processors that it needs.
func TestCrowdedAfterALoneStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busy := false
		g := Gate{giveWay: time.Second, pressed: func() bool { return busy }}
		g.Expect()
		if d := g.crowded(); d != 0 {
			t.Errorf("put off for %v on an idle machine", d)
		}
		time.Sleep(crowdedMost * 3 / 2)
		busy = true
		g.Expect()
		if d := g.crowded(); d != time.Second {
			t.Errorf("put off for %v where many containers start after a lone one, want %v", d, time.Second)
		}
	})
}

// TestPressure: the kernel's file is read, and what is not one says nothing.
func TestPressure(t *testing.T) {
	const file = "some avg10=73.21 avg60=10.87 avg300=16.19 total=35233673624\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
	if got := waiting([]byte(file)); got != 73.21 {
		t.Errorf("%v %% of the last 10 seconds, want 73.21", got)
	}
	if got := waiting(nil); got != 0 {
		t.Errorf("%v %% of an empty file", got)
	}
	b, err := os.ReadFile("/proc/pressure/cpu")
	if err != nil {
		t.Skip("the kernel has no PSI:", err)
	}
	if got := waiting(b); got < 0 || got > 100 {
		t.Errorf("%v %% of this machine's last 10 seconds: %s", got, b)
	}
}
