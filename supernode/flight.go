package supernode

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
)

// flights runs each piece of work once, however many want it. The work does not
// end when those who wait for it leave: what has been fetched is of use to the
// next one, and a node that has given up often asks again.
type flights struct {
	ctx    context.Context // ends with close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu  sync.Mutex
	run map[string]*flight
}

type flight struct {
	done chan struct{}
	err  error // set when done is closed

	mu       sync.Mutex
	state    blockdev.Progress
	watchers map[*func(blockdev.Progress)]struct{}
}

func newFlights() *flights {
	ctx, cancel := context.WithCancel(context.Background())
	return &flights{ctx: ctx, cancel: cancel, run: map[string]*flight{}}
}

func (f *flights) close() {
	f.mu.Lock()
	f.cancel()
	f.mu.Unlock()
	f.wg.Wait()
}

// do joins the flight key, or begins it with work; led says which. watch, which
// may be nil, is told where the work is, first of all at once; calls of it come
// one at a time, and none after do has returned.
func (f *flights) do(ctx context.Context, key string, watch func(blockdev.Progress), work func(context.Context, *flight) error) (led bool, err error) {
	f.mu.Lock()
	fl := f.run[key]
	if fl == nil {
		if f.ctx.Err() != nil {
			f.mu.Unlock()
			return true, fmt.Errorf("the supernode is stopping: %w", blockdev.ErrUnavailable)
		}
		led = true
		fl = &flight{done: make(chan struct{}), watchers: map[*func(blockdev.Progress)]struct{}{}}
		f.run[key] = fl
		f.wg.Go(func() {
			err := work(f.ctx, fl)
			if err != nil && f.ctx.Err() != nil && errors.Is(err, context.Canceled) {
				err = fmt.Errorf("the supernode is stopping: %w", blockdev.ErrUnavailable)
			}
			fl.err = err
			f.mu.Lock()
			delete(f.run, key)
			f.mu.Unlock()
			close(fl.done)
		})
	}
	f.mu.Unlock()
	if watch != nil {
		defer fl.watch(&watch)()
	}
	select {
	case <-fl.done:
		return led, fl.err
	case <-ctx.Done():
		return led, ctx.Err()
	}
}

func (fl *flight) watch(w *func(blockdev.Progress)) (end func()) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.state.Stage != "" {
		(*w)(fl.state)
	}
	fl.watchers[w] = struct{}{}
	return func() {
		fl.mu.Lock()
		defer fl.mu.Unlock()
		delete(fl.watchers, w)
	}
}

// report tells all watchers where the work is.
func (fl *flight) report(p blockdev.Progress) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.state = p
	for w := range fl.watchers {
		(*w)(p)
	}
}
