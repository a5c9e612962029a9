package cache

import (
	"context"
	"sync"
	"time"
)

// gate lets prefetch give way to demand reads, wherever in the Cache they are.
type gate struct {
	mu      sync.Mutex
	readers int
	idle    chan struct{} // closed when readers is 0 again
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
		close(g.idle)
	}
}

// wait returns when no demand read is in flight, or after most at the latest.
func (g *gate) wait(ctx context.Context, most time.Duration) error {
	g.mu.Lock()
	busy, idle := g.readers > 0, g.idle
	g.mu.Unlock()
	if !busy {
		return context.Cause(ctx)
	}
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case <-idle:
		return nil
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
