package prefetch

import (
	"context"
	"sync"
	"time"
)

// Gate makes prefetch wait for demand reads, wherever in the Cache they are. A
// program that starts reads, computes and reads again: prefetch that fills the
// gaps has the next read wait behind it for processor and link, so it waits until
// there has been no demand read for a while. It does not wait for the reads of a diff
// for which nothing comes: what holds them up is not prefetch.
type Gate struct {
	quiet, giveWay time.Duration // Config
	pressed        func() bool   // the processors have more to do than they can

	mu     sync.Mutex
	active map[*Reads]struct{} // those with readers
	idle   chan struct{}       // closed when there are none
	last   time.Time           // when a demand read ended, or was announced
	busy   time.Time           // a program that starts is busy until then
	start  time.Time           // when a container started last
	series time.Time           // when requests began to be put off; crowdedMost
	// hurried is the number of Hurry. A caller's layer waits for a slot that another layer
	// has, and for the one proof that runs, so all go on without pauses.
	hurried int
}

// Reads is the demand reads of one diff; guarded by the Gate.
type Reads struct {
	readers int
	since   time.Time // when the first of them began, or the last chunk came
}

// hungAfter is how long nothing must have come for a diff until its reads count no
// more.
const hungAfter = 10 * time.Second

func (r *Reads) hung(now time.Time) bool { return now.Sub(r.since) >= hungAfter }

// Enter says that a demand read of a diff begins to wait, Leave that it has ended.
func (g *Gate) Enter(r *Reads) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.readers++; r.readers > 1 {
		return
	}
	if g.active == nil {
		g.active = make(map[*Reads]struct{})
	}
	if len(g.active) == 0 {
		g.idle = make(chan struct{})
	}
	g.active[r] = struct{}{}
	r.since = time.Now()
}

// Leave ends what Enter began.
func (g *Gate) Leave(r *Reads) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now := time.Now(); !r.hung(now) {
		g.last = now
	}
	if r.readers--; r.readers > 0 {
		return
	}
	if delete(g.active, r); len(g.active) == 0 {
		close(g.idle)
	}
}

// Came says that a chunk has come for a diff.
func (g *Gate) Came(r *Reads) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r.since = time.Now()
}

// reads says whether there are demand reads that count; mu is held.
func (g *Gate) reads() bool {
	now := time.Now()
	for r := range g.active {
		if !r.hung(now) {
			return true
		}
	}
	return false
}

// Expect says that a container starts: prefetch waits as if a demand read had ended
// just now.
func (g *Gate) Expect() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.last = time.Now()
	g.start = g.last
}

// Hurry says that a caller waits for all of a layer, until done is called.
func (g *Gate) Hurry() (done func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hurried++
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.hurried--
	})
}

// crowdedFor is how long after the start of a container its program may still be
// computing, without any read that misses, if many of them start at once.
const crowdedFor = 20 * time.Second

// crowdedMost bounds the time in which requests are put off: containers may start all the
// time on processors that always have too much to do, and the images are to become
// complete there, too. As much time without it follows. Both are counted from the first
// request that is put off.
const crowdedMost = time.Minute

// crowded returns how long a request that no caller waits for is put off, to leave the
// processors to containers that start.
func (g *Gate) crowded() time.Duration {
	now := time.Now()
	if !g.mayPutOff(now) || !g.pressed() { // which reads a file
		return 0
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if now.Sub(g.series) >= 2*crowdedMost {
		g.series = now
	}
	return g.giveWay
}

// mayPutOff says whether requests are put off if the processors have too much to do.
func (g *Gate) mayPutOff(now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	passed := now.Sub(g.series)
	return g.hurried == 0 && now.Sub(g.start) < crowdedFor && (passed < crowdedMost || passed >= 2*crowdedMost)
}

// startBusy is how long after a program that starts has read something new it is
// thought to be still at it, even if it did not have to wait for the bytes: it
// computes, and prefetch would take the processor from it.
const startBusy = 2 * time.Second

// Starting is called when a program that starts has read something new.
func (g *Gate) Starting() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy = time.Now().Add(startBusy)
}

// Wait returns when there has been no demand read that counts for quiet and no program
// is starting; and after giveWay at the latest, with false.
func (g *Gate) Wait(ctx context.Context) (calm bool, err error) {
	deadline := time.Now().Add(g.giveWay)
	for ctx.Err() == nil {
		g.mu.Lock()
		busy, idle, last, starts := g.reads(), g.idle, g.last, g.busy
		g.mu.Unlock()
		until := deadline
		if !busy {
			idle = nil
			q := last.Add(g.quiet)
			if starts.After(q) {
				q = starts
			}
			if q.Before(until) {
				until = q
			}
		}
		left := time.Until(until)
		if left <= 0 {
			return until.Before(deadline), nil
		}
		select {
		case <-idle:
		case <-time.After(left):
		case <-ctx.Done():
		}
	}
	return false, context.Cause(ctx)
}
