package supernode

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// flights runs each piece of work once, however many want it. The work does not
// end as soon as those who wait for it have left: what has been fetched is of use to
// the next one, and a node that has given up often asks again. How long it may take
// then is said with it.
type flights struct {
	ctx    context.Context // ends with close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu  sync.Mutex
	run map[string]*flight
}

type flight struct {
	done   chan struct{}
	err    error // set when done is closed
	cancel context.CancelCauseFunc
	until  time.Time // when it ends if nobody waits; zero: never

	// Guarded by flights.mu.
	waiters int
	alone   *time.Timer

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

// forever is for work that goes on until it is done, also if nobody waits.
const forever = time.Duration(-1)

// errAlone ends work that nobody waits for, and that has had its time.
var errAlone = fmt.Errorf("nobody waits any more: %w", context.Canceled)

// do joins the flight key, or begins it with work; led says which. Work that takes
// longer than limit (forever: any time) ends when nobody waits for it. watch, which
// may be nil, is told where the work is, first of all at once; calls of it come
// one at a time, and none after do has returned.
func (f *flights) do(ctx context.Context, key string, limit time.Duration, watch func(blockdev.Progress), work func(context.Context, *flight) error) (led bool, err error) {
	f.mu.Lock()
	fl := f.run[key]
	if fl == nil {
		if f.ctx.Err() != nil {
			f.mu.Unlock()
			return true, fmt.Errorf("the supernode is stopping: %w", blockdev.ErrUnavailable)
		}
		led = true
		fl = &flight{done: make(chan struct{}), watchers: map[*func(blockdev.Progress)]struct{}{}}
		var own context.Context
		own, fl.cancel = context.WithCancelCause(f.ctx)
		if limit != forever {
			fl.until = time.Now().Add(limit)
		}
		f.run[key] = fl
		f.wg.Go(func() {
			defer fl.cancel(nil)
			err := work(own, fl)
			if err != nil && f.ctx.Err() != nil && errors.Is(err, context.Canceled) {
				err = fmt.Errorf("the supernode is stopping: %w", blockdev.ErrUnavailable)
			}
			fl.err = err
			f.mu.Lock()
			if f.run[key] == fl {
				delete(f.run, key)
			}
			if fl.alone != nil {
				fl.alone.Stop()
			}
			f.mu.Unlock()
			close(fl.done)
		})
	}
	fl.waiters++
	if fl.alone != nil {
		fl.alone.Stop()
		fl.alone = nil
	}
	f.mu.Unlock()
	defer f.leave(key, fl)
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

// leave sees to the end of work that nobody waits for.
func (f *flights) leave(key string, fl *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl.waiters--; fl.waiters > 0 || fl.until.IsZero() || f.run[key] != fl {
		return
	}
	fl.alone = time.AfterFunc(time.Until(fl.until), func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if fl.waiters == 0 && f.run[key] == fl {
			delete(f.run, key) // who comes now begins anew
			fl.cancel(errAlone)
		}
	})
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
