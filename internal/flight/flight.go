// Package flight runs each piece of work once, however many ask for it, and says
// for each kind of work what golang.org/x/sync/singleflight leaves open.
//
// # Terms
//
//   - flight: work that runs, known by its key. A caller that asks for the same key joins
//     it: the key says which callers may join, so it names all that the answer depends on.
//   - asker: a caller that has joined a flight and has not left it.
//   - state: what a flight's work and its askers share. Its own lock guards what
//     changes while the work runs; what the work sets before it returns may be
//     read by everybody once the flight is done.
//   - policy: what becomes of the work when nobody asks for it any more.
//
// # Invariants
//
//   - At most one flight of a key can be joined. One that was ended since it had
//     no asker may still be running for a moment when the next one begins.
//   - Work gets a context of its own: an asker that leaves takes nothing from the
//     others.
//   - Nothing runs, and no timer is left, when Close returns.
//
// # Callers that wait in another way
//
// Each of these has a reason to share work without a Group:
//
//   - blockdev/cache: a request brings many chunks, so that none of them has work of its
//     own, and a read of them allocates nothing.
//   - blockdev/volume: what is waited for may be queued, paused or due to be tried again;
//     the queue and not the callers begins it.
//   - p2p/swarm: nodes wait for indexes that another call brings; asking begins nothing.
//   - cmd/shoal/internal/node/direct: callers of one pass want different chunks of it,
//     and get them one at a time.
//   - snapshotter: the outcome is used after the work is done, and for a while counts for
//     those that come later.
package flight

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// ErrAlone is the cause of the end of work that had no asker. It wraps
// context.Canceled.
var ErrAlone = fmt.Errorf("no request waits any more: %w", context.Canceled)

// Policy says what becomes of work that has no asker. The zero Policy ends it at
// once.
type Policy struct {
	// Outlives: the work goes on until it is done.
	Outlives bool
	// Else it ends Grace after the last asker has left, and not before it has had
	// Least since its begin.
	Least, Grace time.Duration
}

// Work is what a flight does. ctx ends with the flight.
type Work func(ctx context.Context) error

// Group is a set of flights with keys K and states S. All methods may be called
// from any goroutine.
type Group[K comparable, S any] struct {
	policy Policy
	closed error
	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	mu  sync.Mutex
	run map[K]*flight[S]
}

type flight[S any] struct {
	state  S
	began  time.Time
	cancel context.CancelCauseFunc
	done   chan struct{}
	err    error // set before done is closed

	// Guarded by Group.mu.
	askers int
	policy Policy
	alone  *time.Timer
}

// New returns a Group. closed is the error of work that Close has ended, and of
// those that come later.
func New[K comparable, S any](p Policy, closed error) *Group[K, S] {
	g := &Group[K, S]{policy: p, closed: closed, run: map[K]*flight[S]{}}
	g.ctx, g.cancel = context.WithCancelCause(context.Background())
	return g
}

// Close ends all work and waits for it.
func (g *Group[K, S]) Close() {
	g.mu.Lock()
	g.cancel(g.closed)
	g.mu.Unlock()
	g.wg.Wait()
}

// Asker is one of the callers that wait for a flight. Its end is Leave, or Wait's.
type Asker[S any] struct {
	// State is the flight's.
	State S
	// Led says that this asker has begun the flight.
	Led bool

	fl    *flight[S]
	leave func()
}

// Join joins the flight of key, or begins it with what begin returns. begin is
// called while others wait to join: it must not block. The error is Close's.
func (g *Group[K, S]) Join(key K, begin func() (S, Work)) (*Asker[S], error) {
	return g.JoinWith(key, g.policy, begin)
}

// JoinWith is Join for work with a policy of its own, which counts if this call
// begins it.
func (g *Group[K, S]) JoinWith(key K, p Policy, begin func() (S, Work)) (*Asker[S], error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ctx.Err() != nil {
		return nil, g.closed
	}
	fl := g.run[key]
	led := fl == nil
	if led {
		ctx, cancel := context.WithCancelCause(g.ctx)
		state, work := begin()
		fl = &flight[S]{state: state, began: time.Now(), cancel: cancel, done: make(chan struct{}), policy: p}
		g.run[key] = fl
		g.wg.Go(func() { g.fly(ctx, key, fl, work) })
	}
	fl.askers++
	if fl.alone != nil {
		fl.alone.Stop()
		fl.alone = nil
	}
	return &Asker[S]{State: fl.state, Led: led, fl: fl, leave: sync.OnceFunc(func() { g.leave(key, fl) })}, nil
}

// fly is the life of a flight.
func (g *Group[K, S]) fly(ctx context.Context, key K, fl *flight[S], work Work) {
	defer fl.cancel(nil)
	err := work(ctx)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	fl.err = err
	g.mu.Lock()
	defer g.mu.Unlock()
	g.removeLocked(key, fl)
	if fl.alone != nil {
		fl.alone.Stop()
		fl.alone = nil
	}
	close(fl.done)
}

func (g *Group[K, S]) removeLocked(key K, fl *flight[S]) {
	if g.run[key] == fl {
		delete(g.run, key)
	}
}

// leave sees to the end of work that has no asker any more.
func (g *Group[K, S]) leave(key K, fl *flight[S]) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if fl.askers--; fl.askers > 0 || fl.policy.Outlives || g.run[key] != fl {
		return
	}
	wait := max(fl.policy.Grace, time.Until(fl.began.Add(fl.policy.Least)))
	if wait <= 0 {
		g.endLocked(key, fl)
		return
	}
	fl.alone = time.AfterFunc(wait, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if fl.askers == 0 {
			g.endLocked(key, fl)
		}
	})
}

// endLocked ends a flight without askers. A caller that comes from now on begins again.
func (g *Group[K, S]) endLocked(key K, fl *flight[S]) {
	g.removeLocked(key, fl)
	fl.cancel(ErrAlone)
}

// Len is how many flights can be joined.
func (g *Group[K, S]) Len() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.run)
}

// States are those of all flights that can be joined, in no order.
func (g *Group[K, S]) States() []S {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make([]S, 0, len(g.run))
	for _, fl := range g.run {
		all = append(all, fl.state)
	}
	return all
}

// Done is closed when the flight is done.
func (a *Asker[S]) Done() <-chan struct{} { return a.fl.done }

// Err is how the flight ended, once it is done.
func (a *Asker[S]) Err() error { return a.fl.err }

// Leave says that the asker waits no more. It may be called more than once.
func (a *Asker[S]) Leave() { a.leave() }

// Wait returns how the flight ended, or ctx's error if that ends first, and
// leaves.
func (a *Asker[S]) Wait(ctx context.Context) error {
	defer a.Leave()
	select {
	case <-a.fl.done:
		return a.fl.err
	case <-ctx.Done():
		return ctx.Err()
	}
}
