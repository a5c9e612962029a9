package chain

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// Step is one source of a Chain.
type Step struct {
	// Name is what errors call it.
	Name   string
	Source blockdev.Source
	// Patience is how long it may deliver nothing to a demand request before the
	// next one is asked; 0: for ever. The last source that is asked has all the
	// time that the request has.
	Patience time.Duration
	// Away, if not nil, says whether the source is known to have been out of reach
	// for as long as a request would wait for it. Until then the source that says
	// blockdev.ErrUnavailable is asked again, for chunks that a read waits for and for as long as
	// it may be silent: one that is being restarted refuses connections, or has too much
	// to do just after. nil: the next source is asked at once.
	Away func() bool
	// Status, if not nil, says why the source cannot be reached now, for errors; nil: it
	// can.
	Status func() error
	// PrefetchAfter keeps prefetch from this source until the ones before it have
	// delivered nothing for so long: a registry is not to be asked by all nodes
	// at once because a supernode is being restarted.
	PrefetchAfter time.Duration
	// From is where its chunks come from; FromLocal: it says so itself
	// (blockdev.Request.From).
	From blockdev.Origin
	// Heal, if not nil, is called when the source says blockdev.ErrNotFound. If
	// it returns nil, the source is asked again: a supernode that has lost or
	// evicted a layer has fetched it again.
	Heal func(ctx context.Context, diff blockdev.Digest) error
}

// silentFor is how long demand requests try a source last that has been silent about
// their diff, or about several.
const silentFor = 10 * time.Second

// Chain is a blockdev.Source made of others.
type Chain struct {
	steps []*step
}

var _ blockdev.Source = (*Chain)(nil)

// step is a Step with what is known of it.
type step struct {
	Step

	mu    sync.Mutex
	avoid time.Time // demand of any diff tries it last until then
	good  time.Time // when it last delivered, or the Chain was made
	heard time.Time // when it last delivered, or said that it does not
	// hung are the diffs whose demand tries it last.
	hung map[blockdev.Digest]hung
}

// hung is that a source was silent about a diff.
type hung struct {
	at      time.Time
	healing bool // it had said at once that it has nothing, and was being healed
}

// silent notes that a source was silent about a diff. The source may be well, and
// the diff what hangs: only when it was silent about another diff, too, and has not been
// heard of since, do the requests for all others not wait for it either.
func (s *step) silent(diff blockdev.Digest, healing bool) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hung == nil {
		s.hung = make(map[blockdev.Digest]hung)
	}
	for other, h := range s.hung {
		switch {
		case now.Sub(h.at) >= silentFor:
			delete(s.hung, other)
		case other != diff && !healing && !h.healing && h.at.After(s.heard):
			s.avoid = now.Add(silentFor)
		}
	}
	s.hung[diff] = hung{now, healing}
}

// avoided says whether demand for a diff is to try the source last; mu is held.
func (s *step) avoided(diff blockdev.Digest, now time.Time) bool {
	h, silent := s.hung[diff]
	return now.Before(s.avoid) || silent && now.Sub(h.at) < silentFor
}

// answered notes that the source has said that it does not have something.
func (s *step) answered() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard, s.avoid = time.Now(), time.Time{}
}

// New returns a Chain that asks steps in this order.
func New(steps ...Step) *Chain {
	c := &Chain{}
	for _, s := range steps {
		c.steps = append(c.steps, &step{Step: s, good: time.Now()})
	}
	return c
}

// Fetch implements blockdev.Source. Its error is an *Error, unless deliver or the
// context has ended the request before a source was asked.
func (c *Chain) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	r := &request{Request: req, ctx: ctx, Rest: blockdev.NewRest(req, deliver)}
	steps := c.order(req.Priority, req.Diff)
	if len(req.Chunks) == 0 {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("chunks of diff %s: %w", req.Diff, context.Cause(ctx))
	}
	var tried Error
	for k, s := range steps {
		err := r.try(s, k == len(steps)-1)
		if refused := r.Refused(); refused != nil {
			return refused
		}
		if r.Left() == 0 {
			return nil
		}
		if err == nil {
			err = fmt.Errorf("the source says that it is done, but %d of %d chunks did not come: %w", r.Left(), len(req.Chunks), blockdev.ErrUnavailable)
		}
		tried.tries = append(tried.tries, try{s.Name, err})
		if ctx.Err() != nil {
			tried.ended = context.Cause(ctx)
			break
		}
	}
	if len(tried.tries) == 0 {
		return fmt.Errorf("no source to ask: %w", blockdev.ErrUnavailable)
	}
	return &tried
}

// order is the sources that a request of this priority for chunks of this diff asks.
func (c *Chain) order(prio blockdev.Priority, diff blockdev.Digest) []*step {
	now := time.Now()
	var first, last []*step
	var good time.Time // the latest of those before
	for k, s := range c.steps {
		s.mu.Lock()
		avoid, served := s.avoided(diff, now), s.good
		s.mu.Unlock()
		if k > 0 && prio == blockdev.Prefetch && s.PrefetchAfter > 0 && now.Sub(good) < s.PrefetchAfter {
			continue
		}
		if served.After(good) {
			good = served
		}
		if avoid && prio == blockdev.Demand {
			last = append(last, s)
		} else {
			first = append(first, s)
		}
	}
	return append(first, last...)
}

// request is one call of Fetch.
type request struct {
	blockdev.Request
	*blockdev.Rest
	ctx   context.Context // of the call
	until time.Time       // a source that is unavailable is asked again
}

var errSilent = errors.New("the source is silent")

// try asks one source for what is open, and again when it could be healed.
func (r *request) try(s *step, last bool) error {
	ctx, cancel := context.WithCancelCause(r.ctx)
	defer cancel(nil)
	var silent *time.Timer
	if s.Patience > 0 && r.Priority == blockdev.Demand && !last {
		silent = time.AfterFunc(s.Patience, func() { cancel(errSilent) })
		defer silent.Stop()
	}
	r.until = time.Now().Add(s.Patience)
	healing := false
	var refused error
	err := r.once(ctx, s, silent)
	for pause := minPause; !last && r.again(ctx, s, err); pause = min(2*pause, maxPause) {
		refused = err
		if !wait(ctx, pause/2+rand.N(pause/2)) {
			break
		}
		err = r.once(ctx, s, silent)
	}
	if ctx.Err() == nil && errors.Is(err, blockdev.ErrNotFound) {
		s.answered()
	}
	if s.Heal != nil && r.Refused() == nil && r.Left() > 0 && ctx.Err() == nil && errors.Is(err, blockdev.ErrNotFound) {
		healing = true
		if herr := s.Heal(ctx, r.Diff); herr == nil {
			err = r.once(ctx, s, silent)
		} else {
			err = fmt.Errorf("%w; the source cannot get the layer again: %w", err, herr)
		}
	}
	if r.ctx.Err() == nil && errors.Is(context.Cause(ctx), errSilent) {
		s.silent(r.Diff, healing)
		if refused == nil && s.Status != nil {
			refused = s.Status()
		}
		if refused != nil {
			return fmt.Errorf("no chunk for %v; the last error: %w", s.Patience, refused)
		}
		return fmt.Errorf("no chunk for %v: %w", s.Patience, blockdev.ErrUnavailable)
	}
	return err
}

// minPause and maxPause are the pauses before a source that is unavailable is asked
// again: short while a restart may be over at any moment, and never in step with what
// others do.
const (
	minPause = 50 * time.Millisecond
	maxPause = time.Second
)

// again says whether to ask the source again that has given this error.
func (r *request) again(ctx context.Context, s *step, err error) bool {
	return errors.Is(err, blockdev.ErrUnavailable) && !errors.Is(err, blockdev.ErrNotFound) &&
		r.Priority != blockdev.Prefetch && s.Away != nil && r.Left() > 0 && r.Refused() == nil && ctx.Err() == nil &&
		time.Now().Before(r.until) && !s.Away()
}

// wait returns false if the context ended first.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

func (r *request) once(ctx context.Context, s *step, silent *time.Timer) error {
	req, take := r.Ask() // with its hops: what is forwarded must not wait for what is this node's own
	return s.Source.Fetch(ctx, req, func(k int, data []byte) error {
		if s.From != blockdev.FromLocal {
			req.Comes(s.From)
		}
		err := take(k, data)
		if err == nil {
			s.served(r.Diff)
			r.until = time.Now().Add(s.Patience)
			if silent != nil {
				silent.Reset(s.Patience)
			}
		}
		return err
	})
}

// served notes that a chunk of a diff has come.
func (s *step) served(diff blockdev.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.good, s.avoid = time.Now(), time.Time{}
	s.heard = s.good
	delete(s.hung, diff)
}

// Error says which sources were asked, and why each has failed.
type Error struct {
	tries []try
	ended error // the context's, if it has ended the request
}

type try struct {
	name string
	err  error
}

func (e *Error) Error() string {
	parts := make([]string, len(e.tries))
	for i, t := range e.tries {
		parts[i] = t.err.Error()
		if !strings.HasPrefix(parts[i], t.name) {
			parts[i] = t.name + ": " + parts[i]
		}
	}
	return strings.Join(parts, "; ")
}

// Unwrap returns the errors of the sources. Where some give hope that trying
// again helps and others do not, it returns those that do.
func (e *Error) Unwrap() []error {
	var all, hope []error
	for _, t := range e.tries {
		all = append(all, t.err)
		if !errors.Is(t.err, blockdev.ErrNotFound) && !errors.Is(t.err, blockdev.ErrUnauthorized) && !errors.Is(t.err, blockdev.ErrUnsupported) {
			hope = append(hope, t.err)
		}
	}
	switch {
	case e.ended != nil:
		return append(all, e.ended)
	case len(hope) > 0:
		return hope
	}
	return all
}
