package uplink

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

const (
	// leastHedge and mostHedge bound how long a demand read waits for a sign of life
	// before the next supernode is asked as well: four times what is usual.
	leastHedge = time.Second
	mostHedge  = 2 * time.Second
	// startupHedge, imageHedge and documentHedge are the same for others. A supernode
	// that is at work on an image or a document says so within exchange's FirstSign.
	startupHedge  = 2 * time.Second
	imageHedge    = 800 * time.Millisecond
	documentHedge = 500 * time.Millisecond
	// prefetchGiveUp is how long a prefetch waits before it goes on to the next one. It is
	// not asked for twice: what it waits for may be this node's own link.
	prefetchGiveUp = 10 * time.Second
	// slowFor is how long a supernode is asked last after another one has answered in its
	// place.
	slowFor = 10 * time.Second
	// maxTrials is how many requests may be hedged at a time against a supernode that
	// nobody knows to be slow: more would only fill this node's link, if that is the cause.
	maxTrials = 4
	// trialLook is how often a request looks whether it may be hedged now.
	trialLook = 20 * time.Millisecond
)

// way is how to ask several supernodes.
type way struct {
	// after is how long no supernode that is asked may give a sign of life before the next
	// supernode is asked.
	after time.Duration
	// instead: those asked before are given up then.
	instead bool
}

// ask has s do something. It calls alive at each sign of life, and returns soon after
// its context has ended.
type ask func(ctx context.Context, s Supernode, alive func()) error

// race is one request to several supernodes. One goroutine, run's, decides.
type race struct {
	u    *Uplink
	way  way
	ask  ask
	ctx  context.Context // of all runners
	ends chan *runner

	left    []Supernode // to be asked yet
	running int
	first   error // of the one that was there first, or that sent wrong bytes: it says most
	busy    error // of the first that had too much to do

	mu      sync.Mutex
	runners []*runner
	sign    time.Time // the last one of life, or when the last one was asked
}

// runner is one supernode that is asked.
type runner struct {
	s       Supernode
	cancel  context.CancelFunc
	err     error // once it has ended
	given   bool  // it was given up
	trial   bool  // counts in Uplink.trials
	spoke   bool  // under race.mu: it has given a sign of life
	settled bool  // under race.mu: it has ended, or was given up
}

// errGivenUp is why a runner has ended that another supernode was asked instead of.
var errGivenUp = fmt.Errorf("no sign of life: %w", blockdev.ErrUnavailable)

// race asks supernodes in this order until one has done what is asked: the next one
// when one fails, or is silent for too long. The others are cancelled then, and have
// ended when race returns. Its error says whether all have too much to do, or else is
// that of the first one, or of the first one that has sent wrong bytes.
func (u *Uplink) race(ctx context.Context, order []Supernode, w way, do ask) error {
	ctx, cancel := context.WithCancel(ctx)
	r := &race{u: u, way: w, ask: do, ctx: ctx, ends: make(chan *runner, len(order)), left: order}
	defer r.end(cancel)
	r.start()
	timer := time.NewTimer(w.after)
	defer timer.Stop()
	for {
		select {
		case e := <-r.ends:
			r.running--
			r.settle(e)
			switch {
			case e.err == nil:
				return nil
			case e.given:
				e.err = errGivenUp
			case !next(ctx, e.err):
				return e.err
			}
			r.failed(e.err)
			if !e.given && len(r.left) > 0 {
				r.start()
			}
			if r.running == 0 {
				if r.busy != nil {
					return r.busy
				}
				return r.first
			}
		case <-timer.C:
			timer.Reset(r.look())
		}
	}
}

// failed keeps the error that says most.
func (r *race) failed(err error) {
	if r.first == nil || errors.Is(err, blockdev.ErrCorrupt) && !errors.Is(r.first, blockdev.ErrCorrupt) {
		r.first = err
	}
	if r.busy == nil && errors.Is(err, wire.ErrBusy) {
		r.busy = err
	}
}

// start asks the next supernode.
func (r *race) start() {
	e := &runner{s: r.left[0]}
	r.left = r.left[1:]
	var ctx context.Context
	ctx, e.cancel = context.WithCancel(r.ctx)
	r.mu.Lock()
	r.runners = append(r.runners, e)
	r.sign = time.Now()
	r.mu.Unlock()
	r.running++
	go func() {
		e.err = r.ask(ctx, e.s, func() { r.alive(e) })
		if e.err == nil && ctx.Err() == nil { // else it is another one that has answered
			r.alive(e)
		}
		e.cancel()
		r.ends <- e
	}()
}

// alive notes a sign of life. One that was asked before and has given none is slow.
func (r *race) alive(e *runner) {
	var slow []*runner
	r.mu.Lock()
	r.sign = time.Now()
	first := !e.spoke
	e.spoke = true
	if first {
		for _, other := range r.runners {
			if other == e {
				break
			}
			if !other.spoke && !other.settled {
				slow = append(slow, other)
			}
		}
	}
	r.mu.Unlock()
	if !first {
		return
	}
	r.u.heard(e.s)
	for _, other := range slow {
		r.u.slowed(other.s)
	}
}

// look asks the next supernode if it is time to, and returns when to look again.
func (r *race) look() time.Duration {
	r.mu.Lock()
	wait := time.Until(r.sign.Add(r.way.after))
	r.mu.Unlock()
	switch {
	case wait > 0:
		return wait
	case len(r.left) == 0 || r.ctx.Err() != nil:
		return time.Hour // there is nobody to ask
	}
	last := r.runners[len(r.runners)-1]
	if r.way.instead {
		r.settle(last) // it is no proof of anything that the next one answers
		last.given = true
		last.cancel()
	} else if !last.trial && !r.u.try(last) {
		return trialLook
	}
	r.start()
	return r.way.after
}

// settle notes that a runner has ended, or is given up.
func (r *race) settle(e *runner) {
	r.mu.Lock()
	e.settled = true
	r.mu.Unlock()
}

// end cancels those that still run, and waits for them.
func (r *race) end(cancel context.CancelFunc) {
	cancel()
	for ; r.running > 0; r.running-- {
		<-r.ends
	}
	for _, e := range r.runners {
		if e.trial {
			r.u.tried(e)
		}
	}
}

// pace is what is known of how fast supernodes are.
type pace struct {
	mu sync.Mutex
	// usual is how long the first chunk of a demand read takes, on average.
	usual time.Duration
	// slow are those that others have answered in the place of, and until when they are
	// asked last.
	slow   map[Supernode]time.Time
	trials map[Supernode]int // hedges under way
}

// hedge is how long a demand read waits for a sign of life.
func (p *pace) hedge() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return min(max(4*p.usual, leastHedge), mostHedge)
}

// took notes how long a first chunk took.
func (p *pace) took(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.usual += (d - p.usual) / 16
}

// last says whether to ask s last. Once its time is over one request is to find out
// whether s is still slow; what comes during probe asks others first.
func (p *pace) last(s Supernode, probe time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	until, slow := p.slow[s]
	now := time.Now()
	if slow && !now.Before(until) {
		p.slow[s] = now.Add(probe)
		return false
	}
	return slow
}

func (p *pace) slowed(s Supernode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.slow[s] = time.Now().Add(slowFor)
}

func (p *pace) heard(s Supernode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.slow, s)
}

// forget is for one that is closed.
func (p *pace) forget(s Supernode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.slow, s)
	delete(p.trials, s)
}

// try says whether a request to e may be hedged, and counts it.
func (p *pace) try(e *runner) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, slow := p.slow[e.s]; !slow && p.trials[e.s] >= maxTrials {
		return false
	}
	e.trial = true
	p.trials[e.s]++
	return true
}

func (p *pace) tried(e *runner) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.trials[e.s]--; p.trials[e.s] <= 0 {
		delete(p.trials, e.s)
	}
}
