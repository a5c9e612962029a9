package route

import (
	"testing"
	"time"
)

// drive has a Window fetch through a pipe that gives size/latency bytes per
// second, up to rate.
func drive(w *Window, rounds int, latency time.Duration, rate float64) {
	now := w.since
	for range rounds {
		chunk := 64 << 10
		for range int(w.Bytes()) / chunk {
			now += time.Duration(float64(chunk) / min(float64(w.Bytes())/latency.Seconds(), rate) * 1e9)
			w.Got(now, chunk)
		}
	}
}

func TestWindowGrowsForAsLongAsItPays(t *testing.T) {
	for _, c := range []struct {
		name     string
		latency  time.Duration
		rate     float64
		min, max int64
	}{
		{"the least fills the link", 10 * time.Millisecond, 125e6, windowLeast, 2 * windowLeast},
		{"chunks come late", 200 * time.Millisecond, 125e6, 16 << 20, 64 << 20},
		{"nothing is ever enough", time.Minute, 1e12, windowMost, windowMost},
	} {
		w := NewWindow(0)
		drive(w, 40, c.latency, c.rate)
		if w.Bytes() < c.min || w.Bytes() > c.max {
			t.Errorf("%s: %d bytes, want %d to %d", c.name, w.Bytes(), c.min, c.max)
		}
	}
}

func TestWindowShrinksAgain(t *testing.T) {
	w := NewWindow(0)
	drive(w, 40, 200*time.Millisecond, 125e6)
	if w.Bytes() < 16<<20 {
		t.Fatalf("%d bytes do not fill the pipe", w.Bytes())
	}
	drive(w, 200, 2*time.Millisecond, 125e6)
	if w.Bytes() > 2*windowLeast {
		t.Errorf("still %d bytes where %d would do", w.Bytes(), windowLeast)
	}
}
