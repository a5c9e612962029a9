package exchange

import (
	"context"
	"sync"
	"time"
)

const (
	// minWindow and maxWindow bound what a LinkWindow lets be under way, in bytes.
	// On 1 Gbit/s the smaller is 2 ms of the link, and enough to keep it full
	// where a server takes 1 ms to answer.
	minWindow   = 256 << 10
	firstWindow = 512 << 10
	maxWindow   = 4 << 20

	// recent is how long after a demand read another one is expected. Until
	// then one prefetch request of one chunk is under way at a time.
	recent = 50 * time.Millisecond
	// holdOff is how long prefetch waits for demand requests that are under way
	// before it sends a request of one chunk without room: a steady stream of
	// them slows prefetch to a trickle and does not stop it.
	holdOff = 50 * time.Millisecond

	// An epoch is how long a size is tried: long enough for the rate to mean
	// something.
	minEpoch, maxEpoch = 20 * time.Millisecond, 500 * time.Millisecond
	epochWindows       = 8  // so many windows of bytes
	calmEpochs         = 32 // between two searches
	// worthMore is what a window twice as large must bring to be kept, and
	// worthLess what one of half the size may cost.
	worthMore, worthLess = 1.15, 0.97
)

// LinkWindow bounds the bytes of prefetch that a machine has asked for and not got
// yet, because these stand in front of a demand read on its way here: in the
// server's socket, in a switch, on the wire. It is receiver-driven, since only
// the receiver sees all senders, and finds its size by trial: the smallest that
// does not cost throughput. While demand reads come it is one chunk. Clients of
// one machine share one; its methods may be called from several goroutines.
type LinkWindow struct {
	mu     sync.Mutex
	size   int64
	used   int64
	demand int       // demand requests under way
	last   time.Time // when demand became 0
	queue  []*turn   // those that wait, first come first

	search search
}

// turn is a request that waits for its turn.
type turn struct {
	bytes   int64
	patient bool          // waits for demand requests, too
	granted chan struct{} // closed when its bytes are counted
}

// NewLinkWindow returns a LinkWindow of the usual first size.
func NewLinkWindow() *LinkWindow {
	return &LinkWindow{size: firstWindow, search: search{step: growing}}
}

// Hurried says whether this machine has demand reads under way, or had a moment
// ago.
func (w *LinkWindow) Hurried() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.hurried(time.Now())
}

// share is how many bytes one request should ask for: a part of the window, so
// that the next request is on its way while the answer to this one comes.
func (w *LinkWindow) share() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.hurried(time.Now()) {
		return 1
	}
	return w.size / 4
}

// hurried says whether demand reads are under way or were a moment ago.
func (w *LinkWindow) hurried(now time.Time) bool {
	return w.demand > 0 || now.Sub(w.last) < recent
}

// fits says whether n more bytes may be under way. One request may always be,
// however large, or nothing would ever come.
func (w *LinkWindow) fits(n int64, patient bool, now time.Time) bool {
	switch {
	case w.demand > 0:
		return w.used == 0 && !patient
	case w.used == 0:
		return true
	}
	return !w.hurried(now) && w.used+n <= w.size
}

// try counts n bytes if they fit now.
func (w *LinkWindow) try(n int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) > 0 || !w.fits(n, true, time.Now()) {
		w.search.wanted = true
		return false
	}
	w.used += n
	return true
}

// add counts n bytes whether they fit or not.
func (w *LinkWindow) add(n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.used += n
}

// acquire waits until n bytes fit.
func (w *LinkWindow) acquire(ctx context.Context, n int64) error {
	if w.try(n) {
		return nil
	}
	t := &turn{bytes: n, patient: true, granted: make(chan struct{})}
	w.mu.Lock()
	w.queue = append(w.queue, t)
	w.grant(time.Now())
	w.mu.Unlock()
	patience := time.NewTimer(holdOff)
	defer patience.Stop()
	for {
		select {
		case <-t.granted:
			return nil
		case <-patience.C:
			w.mu.Lock()
			t.patient = false
			w.grant(time.Now())
			w.mu.Unlock()
		case <-ctx.Done():
			w.abandon(t)
			return contextError(ctx)
		}
	}
}

// abandon takes t out of the queue, or gives back what it was granted.
func (w *LinkWindow) abandon(t *turn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, q := range w.queue {
		if q == t {
			w.queue = append(w.queue[:i], w.queue[i+1:]...)
			w.grant(time.Now())
			return
		}
	}
	w.free(t.bytes)
}

// grant lets those in that fit, in the order that they came in.
func (w *LinkWindow) grant(now time.Time) {
	n := 0
	for n < len(w.queue) && w.fits(w.queue[n].bytes, w.queue[n].patient, now) {
		w.used += w.queue[n].bytes
		close(w.queue[n].granted)
		n++
	}
	if n > 0 {
		clear(w.queue[:n])
		w.queue = w.queue[n:]
	}
}

// arrived takes n bytes out that have come.
func (w *LinkWindow) arrived(n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if w.hurried(now) {
		w.search.reset(now)
	} else {
		w.size = w.search.arrived(w.size, n, len(w.queue) > 0, now)
	}
	w.used -= n
	w.grant(now)
}

// release takes n bytes out that will not come.
func (w *LinkWindow) release(n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.free(n)
}

func (w *LinkWindow) free(n int64) {
	w.used -= n
	w.grant(time.Now())
}

// demandBegins and demandEnds bracket a demand request.
func (w *LinkWindow) demandBegins() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.demand++
}

func (w *LinkWindow) demandEnds() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.demand--
	if w.demand == 0 {
		w.last = time.Now()
		w.grant(w.last)
	}
}

// step of a search.
type step int

const (
	calm step = iota
	growing
	shrinking
)

// search looks for the smallest size that gives full throughput: it doubles the
// size while that pays, then halves it while that costs nothing, and rests.
type search struct {
	step   step
	before int64   // the size to go back to; 0: none is being tried
	rate   float64 // bytes a second that before gave

	began           time.Time // the epoch
	bytes           int64
	arrivals, eager int  // in the epoch; eager: more was wanted than fitted
	wanted          bool // since the last arrival
	rested          int  // epochs since the last search
}

// reset starts the epoch again.
func (s *search) reset(now time.Time) {
	s.began, s.bytes, s.arrivals, s.eager, s.wanted = now, 0, 0, 0, false
}

// arrived counts n bytes and returns the size to go on with.
func (s *search) arrived(size, n int64, queued bool, now time.Time) int64 {
	if s.began.IsZero() {
		s.reset(now)
		return size
	}
	s.bytes += n
	s.arrivals++
	if queued || s.wanted {
		s.eager++
	}
	s.wanted = false
	took := now.Sub(s.began)
	if took < minEpoch || (took < maxEpoch && s.bytes < epochWindows*size) {
		return size
	}
	// Where little is asked for, the rate says nothing about the size.
	if limited := s.eager*4 >= s.arrivals*3; limited {
		size = s.judge(size, float64(s.bytes)/took.Seconds())
	}
	s.reset(now)
	return size
}

// judge takes the next step, given the rate at this size.
func (s *search) judge(size int64, rate float64) int64 {
	switch s.step {
	case growing:
		if (s.before == 0 || rate >= s.rate*worthMore) && 2*size <= maxWindow {
			s.before, s.rate = size, rate
			return 2 * size
		}
		if s.before != 0 && rate < s.rate*worthMore {
			size, rate = s.before, s.rate
		}
		s.step, s.before = shrinking, 0
		fallthrough
	case shrinking:
		if s.before == 0 {
			s.rate = rate // of the size that growing has found
		} else if rate < s.rate*worthLess {
			return s.rest(s.before)
		}
		if size/2 < minWindow {
			return s.rest(size)
		}
		s.before = size
		return size / 2
	case calm:
		if s.rested++; s.rested >= calmEpochs {
			s.step, s.before, s.rate = growing, size, rate
			if 2*size > maxWindow {
				s.step, s.before = shrinking, 0
				return size
			}
			return 2 * size
		}
	}
	return size
}

func (s *search) rest(size int64) int64 {
	s.step, s.before, s.rested = calm, 0, 0
	return size
}
