// Package pace hands out a budget of bytes a second: what a daemon sends to nodes, or
// takes from others.
//
// # Invariants
//
//   - Demand comes before startup, and startup before prefetch.
//   - Within one priority those that want bytes have their turns one after the other
//     (deficit round robin by key), so that one that wants much does not get more than
//     others. One that has waited for nobody's bytes but its own waits for at most one
//     quantum of each other.
//   - A Pacer holds nothing but the claims that wait, whose number its users bound.
package pace

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

const (
	// quantum is how many bytes a key gets when its turn comes.
	quantum = blockdev.AvgChunk
	// leastBurst is how many bytes may go at once after a pause.
	leastBurst = blockdev.MaxChunk
	// burstTime is the same as a time, for fast links: what a timer may be late.
	burstTime = 10 * time.Millisecond
)

// Pacer is a budget. Its methods may be called from several goroutines. A nil Pacer has
// no limit.
type Pacer struct {
	limited atomic.Bool // as rate > 0, for those that need no lock then

	mu          sync.Mutex
	rate, burst float64 // rate 0: no limit
	tokens      float64 // may be below zero by one chunk
	at          time.Time
	classes     [3]class // by blockdev.Priority
	timer       *time.Timer
}

// class is those that wait for bytes of one priority.
type class struct {
	bytes int64
	turns []*account // those with waiting, the next one first
	keys  map[string]*account
}

type account struct {
	key     string
	bytes   int64 // of waiting
	credit  int64 // what it may have still; below zero after a large chunk
	waiting []*claim
}

type claim struct {
	bytes   int64
	granted chan struct{}
}

// New returns a Pacer of rate bytes a second; 0: no limit.
func New(rate int64) *Pacer {
	p := &Pacer{at: time.Now()}
	for i := range p.classes {
		p.classes[i].keys = make(map[string]*account)
	}
	p.Set(rate)
	p.tokens = p.burst
	return p
}

// Set changes the rate, for those that wait as well; 0: no limit from now on.
func (p *Pacer) Set(rate int64) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.refill(now)
	p.rate = max(0, float64(rate))
	p.burst = max(leastBurst, p.rate*burstTime.Seconds())
	p.tokens = min(p.tokens, p.burst)
	p.limited.Store(p.rate > 0)
	p.grant(now)
}

// Limited says whether there is a limit now.
func (p *Pacer) Limited() bool { return p != nil && p.limited.Load() }

// Rate is the budget, in bytes a second; 0: no limit.
func (p *Pacer) Rate() int64 {
	if p == nil {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return int64(p.rate)
}

// Wait is how long, at most, what a key asks for now has to wait until its first bytes
// are within the budget, if no caller asks for more of a higher priority first.
func (p *Pacer) Wait(key string, pr blockdev.Priority) time.Duration {
	if !p.Limited() {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rate == 0 {
		return 0
	}
	p.refill(time.Now())
	bytes := p.classes[pr].before(key)
	for _, higher := range order {
		if higher == pr {
			break
		}
		bytes += p.classes[higher].bytes
	}
	return time.Duration((float64(bytes) - min(p.tokens, 0)) / p.rate * float64(time.Second))
}

// order is how priorities come.
var order = [...]blockdev.Priority{blockdev.Demand, blockdev.Startup, blockdev.Prefetch}

// before is how many bytes, at most, go before what a key asks for now: its own, and as
// much of each other.
func (c *class) before(key string) int64 {
	own, others := int64(0), int64(len(c.keys))
	if a := c.keys[key]; a != nil {
		own = a.bytes
		others--
	}
	return min(c.bytes, own+others*(own+quantum))
}

// Waiting is how many bytes wait for the budget, by blockdev.Priority.
func (p *Pacer) Waiting() (bytes [3]int64) {
	if p == nil {
		return bytes
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for pr := range p.classes {
		bytes[pr] = p.classes[pr].bytes
	}
	return bytes
}

// Take waits until n bytes for a key are within the budget. Its error is ctx's cause.
func (p *Pacer) Take(ctx context.Context, key string, pr blockdev.Priority, n int64) error {
	if n == 0 || !p.Limited() {
		return nil
	}
	c := &claim{bytes: n, granted: make(chan struct{})}
	p.mu.Lock()
	p.classes[pr].add(key, c)
	p.grant(time.Now())
	p.mu.Unlock()
	select {
	case <-c.granted:
		return nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.classes[pr].remove(key, c) {
		return nil // granted since
	}
	return context.Cause(ctx)
}

func (p *Pacer) refill(now time.Time) {
	p.tokens = min(p.tokens+p.rate*now.Sub(p.at).Seconds(), p.burst)
	p.at = now
}

// grant lets those in whose turn it is, and sets the timer for the next one.
func (p *Pacer) grant(now time.Time) {
	p.refill(now)
	for {
		c := p.first()
		if c == nil {
			return
		}
		if p.rate == 0 {
			c.next()
			continue
		}
		if p.tokens <= 0 {
			break
		}
		p.tokens -= float64(c.next())
	}
	wait := time.Duration(-p.tokens/p.rate*float64(time.Second)) + time.Microsecond
	if p.timer == nil {
		p.timer = time.AfterFunc(wait, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.grant(time.Now())
		})
		return
	}
	p.timer.Reset(wait)
}

// first is the highest class that has something to wait; nil: none.
func (p *Pacer) first() *class {
	for _, pr := range order {
		if c := &p.classes[pr]; len(c.turns) > 0 {
			return c
		}
	}
	return nil
}

func (c *class) add(key string, cl *claim) {
	a := c.keys[key]
	if a == nil {
		a = &account{key: key}
		c.keys[key] = a
		c.turns = append(c.turns, a)
	}
	a.waiting = append(a.waiting, cl)
	a.bytes += cl.bytes
	c.bytes += cl.bytes
}

// next grants the claim whose turn it is, and returns its bytes; there is one.
func (c *class) next() int64 {
	for {
		a := c.turns[0]
		copy(c.turns, c.turns[1:])
		c.turns[len(c.turns)-1] = a
		if a.credit = min(a.credit+quantum, quantum); a.credit <= 0 {
			continue // it has had more than a quantum before
		}
		cl := a.waiting[0]
		a.credit -= cl.bytes
		close(cl.granted)
		c.drop(a, 0)
		return cl.bytes
	}
}

// drop takes claim i of a out, and a if it has no other.
func (c *class) drop(a *account, i int) {
	c.bytes -= a.waiting[i].bytes
	a.bytes -= a.waiting[i].bytes
	a.waiting = append(a.waiting[:i], a.waiting[i+1:]...)
	if len(a.waiting) > 0 {
		return
	}
	delete(c.keys, a.key)
	for k, t := range c.turns {
		if t == a {
			c.turns = append(c.turns[:k], c.turns[k+1:]...)
			return
		}
	}
}

// remove takes a claim out; false: it is not there any more.
func (c *class) remove(key string, cl *claim) bool {
	a := c.keys[key]
	if a == nil {
		return false
	}
	for i, w := range a.waiting {
		if w == cl {
			c.drop(a, i)
			return true
		}
	}
	return false
}
