package supernode

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
)

var errStopping = fmt.Errorf("the supernode is stopping: %w", blockdev.ErrUnavailable)

// requests are those that run. They end with the supernode.
type requests struct {
	ctx    context.Context // ends with close
	cancel context.CancelFunc

	mu      sync.Mutex
	closed  bool
	running sync.WaitGroup
}

func newRequests() *requests {
	r := &requests{}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// do runs a request; its context also ends with the supernode. The error is that of run
// or says, of what, that the supernode is stopping.
func (r *requests) do(ctx context.Context, what string, run func(context.Context) error) error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return fmt.Errorf("%.300s: %w", what, errStopping)
	}
	r.running.Add(1)
	r.mu.Unlock()
	defer r.running.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	err := run(ctx)
	if err != nil && r.ctx.Err() != nil {
		return fmt.Errorf("%.300s: %w", what, errStopping)
	}
	return err
}

// close ends all requests and waits for them.
func (r *requests) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.running.Wait()
}

// closers close what was opened, the last one first.
type closers []func() error

func (c *closers) add(f func() error) { *c = append(*c, f) }

func (c *closers) close() error {
	var errs []error
	for _, f := range slices.Backward(*c) {
		errs = append(errs, f())
	}
	*c = nil
	return errors.Join(errs...)
}
