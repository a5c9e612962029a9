package exchange

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

const (
	// quantum is how many bytes a peer sends when its turn comes.
	quantum = blockdev.AvgChunk
	// leastBurst is how many bytes may go at once after a pause.
	leastBurst = blockdev.MaxChunk
	// burstTime is the same as a time, for fast links: what a timer may be late.
	burstTime = 10 * time.Millisecond

	// What waits for longer than this finds out at once, as busy.
	demandBacklog   = 100 * time.Millisecond
	prefetchBacklog = time.Second
)

// Pacer hands out a budget of bytes per second: demand before prefetch, and in
// turns among the peers that want some (deficit round robin), so that one that
// wants much does not get more than others. It holds nothing but those that
// wait, whose number the limits of server and client bound. A nil Pacer has no
// limit.
type Pacer struct {
	rate, burst float64

	mu      sync.Mutex
	tokens  float64 // may be below zero by one chunk
	at      time.Time
	classes [3]class // by blockdev.Priority
	timer   *time.Timer
}

// class is those that wait for bytes of one priority.
type class struct {
	bytes int64
	turns []*account // those with waiting, the next one first
	peers map[peer.ID]*account
}

type account struct {
	id      peer.ID
	credit  int64 // what it may have still; below zero after a large chunk
	waiting []*claim
}

type claim struct {
	bytes   int64
	granted chan struct{}
}

// NewPacer returns a Pacer of rate bytes a second; nil if rate is 0.
func NewPacer(rate int64) *Pacer {
	if rate <= 0 {
		return nil
	}
	p := &Pacer{rate: float64(rate), at: time.Now()}
	p.burst = max(leastBurst, p.rate*burstTime.Seconds())
	p.tokens = p.burst
	for i := range p.classes {
		p.classes[i].peers = make(map[peer.ID]*account)
	}
	return p
}

// busy returns wire.ErrBusy if what is asked for now would wait for too long.
func (p *Pacer) busy(pr blockdev.Priority) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refill(time.Now())
	bytes, limit := p.classes[blockdev.Demand].bytes, demandBacklog
	if pr != blockdev.Demand {
		bytes, limit = bytes+p.classes[blockdev.Startup].bytes, prefetchBacklog
	}
	if pr == blockdev.Prefetch {
		bytes += p.classes[blockdev.Prefetch].bytes
	}
	wait := time.Duration((float64(bytes) - min(p.tokens, 0)) / p.rate * float64(time.Second))
	if wait > limit {
		return fmt.Errorf("the budget of %.0f bytes/s is used up for %v: %w", p.rate, wait.Round(time.Millisecond), wire.ErrBusy)
	}
	return nil
}

// take waits until n bytes for a peer are within the budget.
func (p *Pacer) take(ctx context.Context, id peer.ID, pr blockdev.Priority, n int64) error {
	if p == nil || n == 0 {
		return nil
	}
	c := &claim{bytes: n, granted: make(chan struct{})}
	p.mu.Lock()
	p.classes[pr].add(id, c)
	p.grant(time.Now())
	p.mu.Unlock()
	select {
	case <-c.granted:
		return nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.classes[pr].remove(id, c) {
		return nil // granted meanwhile
	}
	return contextError(ctx)
}

func (p *Pacer) refill(now time.Time) {
	p.tokens = min(p.tokens+p.rate*now.Sub(p.at).Seconds(), p.burst)
	p.at = now
}

// grant lets those in whose turn it is, and sets the timer for the next one.
func (p *Pacer) grant(now time.Time) {
	p.refill(now)
	for {
		c := &p.classes[blockdev.Demand]
		if len(c.turns) == 0 {
			c = &p.classes[blockdev.Startup]
		}
		if len(c.turns) == 0 {
			c = &p.classes[blockdev.Prefetch]
		}
		if len(c.turns) == 0 {
			return
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

func (c *class) add(id peer.ID, cl *claim) {
	a := c.peers[id]
	if a == nil {
		a = &account{id: id}
		c.peers[id] = a
		c.turns = append(c.turns, a)
	}
	a.waiting = append(a.waiting, cl)
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
	a.waiting = append(a.waiting[:i], a.waiting[i+1:]...)
	if len(a.waiting) > 0 {
		return
	}
	delete(c.peers, a.id)
	for k, t := range c.turns {
		if t == a {
			c.turns = append(c.turns[:k], c.turns[k+1:]...)
			return
		}
	}
}

// remove takes a claim out; false: it is not there any more.
func (c *class) remove(id peer.ID, cl *claim) bool {
	a := c.peers[id]
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
