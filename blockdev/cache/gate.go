package cache

import (
	"context"
	"sync"
	"time"
)

// gate lets prefetch give way to demand reads, wherever in the Cache they are. A
// program that starts reads, computes and reads again: prefetch that fills the
// gaps has the next read wait behind it for processor and link, so it waits until
// there has been no demand read for a while.
type gate struct {
	mu      sync.Mutex
	readers int
	idle    chan struct{} // closed when readers is 0 again
	last    time.Time     // when it became 0, or a demand read was announced
	busy    time.Time     // a program that starts is busy until then
}

func (g *gate) enter() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.readers++; g.readers == 1 {
		g.idle = make(chan struct{})
	}
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.readers--; g.readers == 0 {
		g.last = time.Now()
		close(g.idle)
	}
}

// expect has prefetch wait as if a demand read had ended just now.
func (g *gate) expect() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.last = time.Now()
}

// startBusy is how long after a program that starts has read something new it is
// thought to be still at it, even if it did not have to wait for the bytes: it
// computes, and prefetch would take the processor from it.
const startBusy = 2 * time.Second

// starting is called when a program that starts has read something new.
func (g *gate) starting() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy = time.Now().Add(startBusy)
}

// wait returns when there has been no demand read for quiet and no program is
// starting; and after most at the latest, with false.
func (g *gate) wait(ctx context.Context, quiet, most time.Duration) (calm bool, err error) {
	deadline := time.Now().Add(most)
	for ctx.Err() == nil {
		g.mu.Lock()
		busy, idle, last, starts := g.readers > 0, g.idle, g.last, g.busy
		g.mu.Unlock()
		until := deadline
		if !busy {
			idle = nil
			q := last.Add(quiet)
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
		t := time.NewTimer(left)
		select {
		case <-idle:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
	return false, context.Cause(ctx)
}
