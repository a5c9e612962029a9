package snapshotter

import (
	"context"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// pullKey tells pulls apart. containerd says nowhere that a pull begins or ends.
type pullKey struct {
	namespace string
	ref       string
	manifest  blockdev.Digest
}

// pull is one decision, for all layers of an image: lazy or not. It is made once,
// however many Prepares wait for it, and stands until the pull's last layer has
// been answered, a layer is asked for a second time (so this is a new pull), or
// nothing has been asked for a while.
type pull struct {
	done   chan struct{} // closed when image and err are set
	cancel context.CancelFunc
	image  *openImage // nil: not lazy
	err    error      // why not

	explain sync.Once // for causes that show after the decision

	// Below here under pulls.mu.
	users  int
	over   bool // no longer in pulls.m
	served map[string]struct{}
	idle   *time.Timer
}

// pulls holds the decisions.
type pulls struct {
	mu     sync.Mutex
	m      map[pullKey]*pull
	closed bool
	// flights counts goroutines: decisions being made, and idle pulls being ended.
	flights sync.WaitGroup

	base    context.Context // ends with the snapshotter
	timeout time.Duration   // of a decision
	idle    time.Duration
	// ended is called, in a goroutine, when a pull is given up with layers missing.
	ended func(ctx context.Context)
}

// join returns the decision for key, made by open if there is none yet. It
// returns an error only if ctx or the snapshotter ends first. leave must be
// called when the layer has been answered, saying whether that was the last one.
func (ps *pulls) join(ctx context.Context, key pullKey, chain string,
	open func(context.Context) (*openImage, error),
) (p *pull, leave func(last bool), err error) {
	ps.mu.Lock()
	if ps.closed {
		ps.mu.Unlock()
		return nil, nil, errClosing
	}
	p = ps.m[key]
	if p != nil {
		if _, again := p.served[chain]; again {
			ps.endLocked(key, p)
			p = nil
		}
	}
	if p == nil {
		p = ps.startLocked(key, open)
	}
	p.users++
	if p.idle != nil {
		p.idle.Stop()
		p.idle = nil
	}
	ps.mu.Unlock()

	leave = func(last bool) { ps.leave(key, p, chain, last) }
	select {
	case <-p.done:
		return p, leave, nil
	case <-ctx.Done():
		ps.abandon(key, p)
		return nil, nil, ctx.Err()
	}
}

func (ps *pulls) startLocked(key pullKey, open func(context.Context) (*openImage, error)) *pull {
	// Not the first caller's context: others may wait for the same decision.
	ctx, cancel := context.WithTimeout(ps.base, ps.timeout)
	p := &pull{done: make(chan struct{}), cancel: cancel, served: make(map[string]struct{})}
	if ps.m == nil {
		ps.m = make(map[pullKey]*pull)
	}
	ps.m[key] = p
	ps.flights.Go(func() {
		defer cancel()
		image, err := open(ctx)
		ps.mu.Lock()
		p.image, p.err = image, err
		close(p.done)
		ps.releaseLocked(p)
		ps.mu.Unlock()
	})
	return p
}

// leave ends one caller's use of a decision after its layer has been answered.
func (ps *pulls) leave(key pullKey, p *pull, chain string, last bool) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p.users--
	p.served[chain] = struct{}{}
	if last {
		ps.endLocked(key, p)
		return
	}
	if p.users == 0 && !p.over {
		p.idle = time.AfterFunc(ps.idle, func() { ps.expire(key, p) })
	}
	ps.releaseLocked(p)
}

// abandon ends the use of a caller that has gone before the decision was made.
func (ps *pulls) abandon(key pullKey, p *pull) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p.users--
	if p.users == 0 {
		p.cancel()
		ps.endLocked(key, p)
	}
}

func (ps *pulls) expire(key pullKey, p *pull) {
	ps.mu.Lock()
	if ps.closed || p.over || p.users > 0 {
		ps.mu.Unlock()
		return
	}
	ps.endLocked(key, p)
	ps.flights.Add(1)
	ps.mu.Unlock()
	defer ps.flights.Done()
	ps.ended(ps.base)
}

// endLocked makes the next Prepare a new pull.
func (ps *pulls) endLocked(key pullKey, p *pull) {
	if !p.over {
		p.over = true
		delete(ps.m, key)
	}
	if p.idle != nil {
		p.idle.Stop()
		p.idle = nil
	}
	ps.releaseLocked(p)
}

// releaseLocked lets the diffs go when nobody will ask for them any more.
func (ps *pulls) releaseLocked(p *pull) {
	if p.over && p.users == 0 && p.image != nil {
		p.image.release()
	}
}

// close ends all pulls and waits for decisions under way, whose context has
// been cancelled by then.
func (ps *pulls) close() {
	ps.mu.Lock()
	ps.closed = true
	for key, p := range ps.m {
		ps.endLocked(key, p)
	}
	ps.mu.Unlock()
	ps.flights.Wait()
}
