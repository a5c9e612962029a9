package route

import "time"

// Bounds of a Window, in bytes.
const (
	windowLeast = 4 << 20
	windowMost  = 64 << 20
)

// Window says how many bytes a node's prefetches may have asked for and not got
// yet. What is asked for and not there yet waits at some other node and costs
// next to nothing; what is on its way is in front of demand reads. So the window
// is as small as fills the link: it is doubled for as long as that brings more
// bytes per second, by a twentieth at least. From time to time half of it, or
// twice as much, is tried anew, since what was the bottleneck (a supernode, a
// swarm that had just begun) may not be any more.
//
// A Window serves all prefetches of a node. It is not safe for concurrent use.
type Window struct {
	size  int64
	got   int64         // bytes since
	since time.Duration // when the present round began
	best  float64       // bytes/s of the size that trial is compared with
	rest  int           // rounds until the next trial
	trial trial
	down  bool // the next trial is a smaller one
}

type trial uint8

const (
	steady trial = iota
	larger
	smaller
)

// windowRest is how many rounds are between two trials.
const windowRest = 8

// NewWindow returns a Window of the least size.
func NewWindow(now time.Duration) *Window { return &Window{size: windowLeast, since: now} }

// Bytes is the present size.
func (w *Window) Bytes() int64 { return w.size }

// Got says that so many bytes of prefetches came.
func (w *Window) Got(now time.Duration, bytes int) {
	w.got += int64(bytes)
	// A round takes a window: after a doubling, half of it was asked for before it,
	// and half shows what it brings.
	if w.got < w.size || now <= w.since {
		return
	}
	rate := float64(w.got) / (now - w.since).Seconds()
	w.got, w.since = 0, now
	switch {
	case rate > 1.05*w.best:
		w.best = rate
		w.resize(larger)
	case w.trial == larger:
		// It was of no use. Smaller is what the next trial is of.
		w.size, w.down = w.size/2, true
		w.settle()
	case w.trial == smaller:
		if rate < w.best/1.05 {
			w.size, w.down = 2*w.size, false
		}
		w.settle()
	case w.rest > 0:
		w.rest--
		w.best = max(rate, .9*w.best)
	case w.down:
		w.best = rate
		w.resize(smaller)
	default:
		w.best = rate
		w.resize(larger)
	}
}

func (w *Window) settle() { w.trial, w.rest = steady, windowRest }

// resize begins a trial, if the bounds leave room for one.
func (w *Window) resize(to trial) {
	size := 2 * w.size
	if to == smaller {
		size = w.size / 2
	}
	if size < windowLeast || size > windowMost {
		w.down = to == larger
		w.settle()
		return
	}
	w.size, w.trial = size, to
}

// Idle begins a new round: nothing was asked for lately, so that the rate says
// nothing about the size.
func (w *Window) Idle(now time.Duration) { w.got, w.since = 0, now }
