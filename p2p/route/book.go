package route

import (
	"sync"
	"time"
)

// Outcome is what became of a request to a peer.
type Outcome uint8

// Outcomes. All but OK make the next call of Next name somebody else.
const (
	// OK: the chunk came and has the right digest.
	OK Outcome = iota
	// Busy: the peer said so, at once.
	Busy
	// Missing: the peer does not have the chunk and cannot get it.
	Missing
	// Slow: it was given up, after what Patience says; or another one, asked
	// later, was first.
	Slow
	// Dead: no connection, or it broke.
	Dead
	// Corrupt: wrong bytes, or a broken rule of the protocol.
	Corrupt
)

// How long peers are left out.
const (
	busyWait = 5 * time.Millisecond // after a busy answer; doubled with each wait

	deadFor    = time.Second      // after the first failure; doubled with each further one
	deadAtMost = time.Minute      //
	corruptFor = 10 * time.Minute // after wrong bytes; doubled, too
	corruptMax = 24 * time.Hour

	slowLimit = 3  // slow answers in a row that count as a failure
	goodLimit = 16 // good answers after which failures are forgotten

	maxPeers = 8192 // peers in trouble that are remembered
)

const never = time.Duration(1<<63 - 1)

// BookOptions change a Book. The zero value of each field stands for its default.
type BookOptions struct {
	// HedgeShare is which part of the bytes of demand reads may be asked for
	// twice: 0.02.
	HedgeShare float64
}

// Book is a node's history with its peers: which failed, how long answers take,
// how many bytes hedging may cost. One Book serves all groups of a node. It may
// be used from several goroutines.
type Book struct {
	mu      sync.Mutex
	scratch []uint64 // of decisions, which hold mu

	// peers are those in trouble only: with a good peer there is nothing to
	// remember.
	peers map[string]*trouble
	outs  int           // peers that are out
	gen   uint64        // changes whenever a peer goes out or comes back
	next  time.Duration // when the next one comes back

	demand, prefetch latencies
	budget           budget
	below            below
}

// below is how it went lately to ask the one below in a tree, which a root does in case
// it came late and the others have everything. Where all came at once nobody has
// anything, and each such question costs an answer's time: after some failures it
// is asked for one chunk in eight only, until one is answered.
type below struct {
	vain  uint8 // in a row
	turns uint8
}

const (
	vainLimit = 8
	vainTurns = 8
)

func (b *below) report(o Outcome) {
	switch {
	case o == OK:
		b.vain = 0
	case o == Missing && b.vain < vainLimit:
		b.vain++
	}
}

// ask says whether to ask this time.
func (b *below) ask() bool {
	b.turns++
	return b.vain < vainLimit || b.turns%vainTurns == 0
}

// trouble is the history with one peer that failed lately.
type trouble struct {
	out       bool
	until     time.Duration // out or busy until then
	busyUntil time.Duration
	slow      uint8 // in a row
	good      uint8 // in a row
	strikes   uint8 // times out, not forgotten yet
}

// NewBook returns a Book without history.
func NewBook(o BookOptions) *Book {
	if o.HedgeShare == 0 {
		o.HedgeShare = 0.02
	}
	return &Book{peers: map[string]*trouble{}, next: never, budget: budget{share: o.HedgeShare, credit: hedgeBurst}}
}

// Report says what became of a request that Next chose: took is the time from
// request to answer, bytes what came. Targets that are no peers are reported, too.
func (g *Group) Report(a *Ask, t Target, o Outcome, now, took time.Duration, bytes int) {
	b := g.book
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case o == OK:
		b.learn(a.demand, took, bytes)
	case o == Slow && a.demand:
		// How long it would have taken is not known, but that it is more: a
		// Book that learned only from what came in time would never wait for longer.
		b.demand.add(2 * took)
	}
	if t.Kind != Peer {
		return
	}
	if o == Busy {
		for i, h := range a.tried[:a.ntried] {
			if h == uint32(g.t.hash[t.Index]>>32) {
				a.busy |= 1 << i
			}
		}
	}
	if t.Hops == MaxHops && a.Hops() < MaxHops-1 {
		b.below.report(o)
	}
	b.judge(g.id(t.Index), o, now)
}

func (b *Book) learn(demand bool, took time.Duration, bytes int) {
	if demand {
		b.demand.add(took)
		b.budget.earn(bytes)
	} else {
		b.prefetch.add(took)
	}
}

// judge keeps the history with one peer.
func (b *Book) judge(id string, o Outcome, now time.Duration) {
	p := b.peers[id]
	if o == OK {
		if p == nil {
			return
		}
		p.slow = 0
		if p.good++; p.good >= goodLimit && !p.out {
			delete(b.peers, id)
		}
		return
	}
	if o == Missing {
		return
	}
	if p == nil {
		if len(b.peers) >= maxPeers {
			b.forget()
		}
		p = &trouble{}
		b.peers[id] = p
	}
	doubtful := p.doubtful()
	p.good = 0
	switch o {
	case Busy:
		p.busyUntil = now + busyWait
	case Slow:
		if p.slow++; p.slow >= slowLimit || doubtful {
			b.eject(p, now, deadFor, deadAtMost)
		}
	case Dead:
		b.eject(p, now, deadFor, deadAtMost)
	case Corrupt:
		b.eject(p, now, corruptFor, corruptMax)
	}
}

// doubtful says whether the peer was left out, and its last answer was no good one.
func (p *trouble) doubtful() bool { return p.strikes > 0 && p.good == 0 }

// Doubtful says whether the peer was left out, and its last answer was not a good one. A read that waits
// for a chunk asks another peer at the same time.
func (b *Book) Doubtful(id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.peers[id]
	return p != nil && p.doubtful()
}

// Judge is Report for what was asked of a peer outside of a Group.
func (b *Book) Judge(id string, o Outcome, now time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.judge(id, o, now)
}

// eject leaves p out for a while: first, doubled for each time before. What was
// under way to a peer when it went out fails as well, and counts once.
func (b *Book) eject(p *trouble, now, first, atMost time.Duration) {
	for range min(p.strikes, 16) {
		first = min(2*first, atMost)
	}
	p.slow = 0
	if p.out {
		p.until = max(p.until, now+first)
		return
	}
	p.out, p.until = true, now+first
	p.strikes++
	b.outs++
	b.gen++
	b.next = min(b.next, p.until)
}

// letIn lets those in again whose time has come. They are asked like everybody
// else; one more failure puts them out for twice as long.
func (b *Book) letIn(now time.Duration) {
	if now < b.next {
		return
	}
	b.next = never
	for _, p := range b.peers {
		switch {
		case !p.out:
		case p.until <= now:
			p.out = false
			b.outs--
			b.gen++
		default:
			b.next = min(b.next, p.until)
		}
	}
}

// forget drops all peers that are not out; if all are, those that are out, too: a
// bound on memory matters more than what is known about so many.
func (b *Book) forget() {
	for id, p := range b.peers {
		if !p.out {
			delete(b.peers, id)
		}
	}
	if len(b.peers) >= maxPeers {
		clear(b.peers)
		b.outs, b.next = 0, never
		b.gen++
	}
}

func (b *Book) isOut(id string) bool {
	if b.outs == 0 {
		return false
	}
	p := b.peers[id]
	return p != nil && p.out
}

func (b *Book) isBusy(id string, now time.Duration) bool {
	if len(b.peers) == 0 {
		return false
	}
	p := b.peers[id]
	return p != nil && now < p.busyUntil
}

// Out says whether the peer is left out at present.
func (b *Book) Out(id string, now time.Duration) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.letIn(now)
	return b.isOut(id)
}

// Outs is how many peers are left out at present.
func (b *Book) Outs(now time.Duration) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.letIn(now)
	return b.outs
}
