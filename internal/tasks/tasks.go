// Package tasks runs what goes on in the background for as long as its owner lives, and ends
// what the owner is made of.
package tasks

import (
	"context"
	"sync"
)

// Group is the tasks of one owner. All methods may be called from any goroutine.
type Group struct {
	ctx    context.Context // ends with the owner: it is its life, not a caller's
	cancel context.CancelFunc

	mu sync.Mutex // so that no task begins once ctx has ended
	wg sync.WaitGroup
}

// New returns a Group without tasks.
func New() *Group {
	g := &Group{}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	return g
}

// Context ends when the owner ends. Tasks end with it.
func (g *Group) Context() context.Context { return g.ctx }

// Run begins a task; false: the owner has ended, and the task does not run.
func (g *Group) Run(task func()) bool {
	end, ok := g.Begin()
	if ok {
		go func() {
			defer end()
			task()
		}()
	}
	return ok
}

// Begin is Run for a task that the caller runs itself, and whose end it says with end.
func (g *Group) Begin() (end func(), ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ctx.Err() != nil {
		return nil, false
	}
	g.wg.Add(1)
	return g.wg.Done, true
}

// End ends Context. No task begins from then on. It does not wait.
func (g *Group) End() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.cancel()
}

// Close is End, and waits for the tasks.
func (g *Group) Close() {
	g.End()
	g.wg.Wait()
}
