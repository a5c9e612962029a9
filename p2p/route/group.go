package route

import (
	"math"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

const (
	// Fanout is how many members ask one and the same parent for a chunk.
	Fanout = 3
	// MaxTries is how many peers are tried for a chunk before the supernode is.
	MaxTries = 8
	// MaxHops bounds how often a request is forwarded from node to node: 30 is
	// more than a tree of trees of 10,000 members has levels. A node that gets a request that says
	// MaxHops does not forward it: it answers at once, that it lacks the chunk if so.
	MaxHops = 30
	// maxWaits is how often a prefetch waits for busy peers before it asks the
	// supernode after all.
	maxWaits = 16
)

// Kind says what a Target is.
type Kind uint8

// What Next may answer.
const (
	Peer      Kind = iota // ask the member ID
	Supernode             // ask the supernode
	Later                 // call Next again after Wait
	Nobody                // all have failed
)

// Target is the peer to ask.
type Target struct {
	Kind Kind
	// Index is the member's position in the table, -1 if Kind is not Peer.
	Index int
	// ID is the member's peer ID; empty if Kind is not Peer.
	ID string
	// Hops is what the request is to say. With MaxHops it is not forwarded.
	Hops int
	// Wait is set if Kind is Later.
	Wait time.Duration
}

// Ask is the search for one chunk: its key, and what was tried. It is a plain
// value, to be used by one goroutine at a time.
type Ask struct {
	key    Key
	tried  [MaxTries]uint32 // the upper halves of hashes
	ntried uint8
	busy   uint16 // bit i: tried[i] was busy
	waits  uint8
	hops   uint8
	demand bool
	last   bool // the supernode was tried
}

// NewAsk begins the search for a chunk. hops is that of the request that is
// served by it, or 0 if it is this node's own.
func NewAsk(chunk blockdev.Digest, p blockdev.Priority, hops int) Ask {
	return AskKey(KeyOf(chunk), p, hops)
}

// AskKey is NewAsk for callers that have the key already.
func AskKey(key Key, p blockdev.Priority, hops int) Ask {
	return Ask{key: key, hops: uint8(min(max(hops, 0), MaxHops)), demand: p == blockdev.Demand}
}

// Promote turns a prefetch into a demand read, because a read waits now.
func (a *Ask) Promote() { a.demand = true }

// Hops is how often the request was forwarded before it came to this node.
func (a *Ask) Hops() int { return int(a.hops) }

func (a *Ask) has(h uint64) bool {
	for _, t := range a.tried[:a.ntried] {
		if t == uint32(h>>32) {
			return true
		}
	}
	return false
}

// wait forgets the busy ones, so that they are tried again.
func (a *Ask) wait() {
	n := 0
	for i, t := range a.tried[:a.ntried] {
		if a.busy>>i&1 == 0 {
			a.tried[n] = t
			n++
		}
	}
	a.ntried, a.busy = uint8(n), 0
	a.waits++
}

// Group makes decisions for one node and one view of one group. It may be used
// from several goroutines: it shares the lock of its Book, which is never held
// for longer than a decision takes.
type Group struct {
	t    *Table
	book *Book
	self uint64 // hash of the node's ID

	// Members that are not out. hash is the table's and index nil as long as
	// nobody is out.
	gen   uint64 // of book, when they were made
	hash  []uint64
	index []uint16
}

// NewGroup returns the Group of node self, which is in the cell that t is of.
func NewGroup(self Member, t *Table, b *Book) *Group {
	return &Group{t: t, book: b, self: hashID(self.ID), hash: t.hash[:len(t.view.Members)]}
}

// Table returns what the Group was made of.
func (g *Group) Table() *Table { return g.t }

// Next says which peer to ask for the chunk, at the time now (since any fixed moment).
// What became of it is to be reported before the next call. It may be called
// while a request is under way, to hedge it: it gives another peer then.
func (g *Group) Next(a *Ask, now time.Duration) Target {
	g.book.mu.Lock()
	defer g.book.mu.Unlock()
	switch {
	case a.last:
		return Target{Kind: Nobody, Index: -1}
	case a.hops >= MaxHops:
		return g.supernode(a)
	case a.ntried == MaxTries:
		return g.exhausted(a, a.busy != 0)
	}
	g.refresh(now)
	if a.ntried == 0 {
		c := g.parent(a.key)
		if c < 0 {
			return g.supernode(a)
		}
		if a.demand || !g.book.isBusy(g.id(c), now) {
			return g.peer(a, c)
		}
	}
	var buf [maxCandidates]int32
	busy := a.busy != 0
	for _, c := range g.candidates(a.key, buf[:0]) {
		if a.has(g.t.hash[c]) || g.book.isOut(g.id(int(c))) {
			continue
		}
		if !a.demand && g.book.isBusy(g.id(int(c)), now) {
			busy = true
			continue
		}
		return g.peer(a, int(c))
	}
	return g.exhausted(a, busy)
}

// exhausted is the answer when there is nobody left to try: if busy, some are
// left that had no time, and a prefetch can wait for them.
func (g *Group) exhausted(a *Ask, busy bool) Target {
	if busy && !a.demand && a.waits < maxWaits {
		wait := busyWait << min(a.waits, 8)
		a.wait()
		return Target{Kind: Later, Index: -1, Wait: wait}
	}
	return g.supernode(a)
}

func (g *Group) id(i int) string {
	if n := len(g.t.view.Members); i >= n {
		return g.t.view.Gateways[i-n].ID
	}
	return g.t.view.Members[i].ID
}

func (g *Group) peer(a *Ask, i int) Target {
	a.tried[a.ntried] = uint32(g.t.hash[i] >> 32)
	a.ntried++
	t := Target{Kind: Peer, Index: i, ID: g.id(i), Hops: int(a.hops) + 1}
	if i < len(g.t.view.Members) && rank(a.key, g.t.hash[i]) < rank(a.key, g.self) {
		// One below, which would send the request back up.
		t.Hops = MaxHops
	}
	return t
}

func (g *Group) supernode(a *Ask) Target {
	a.last = true
	return Target{Kind: Supernode, Index: -1, Hops: min(int(a.hops)+1, MaxHops)}
}

// refresh leaves out those that are out now.
func (g *Group) refresh(now time.Duration) {
	g.book.letIn(now)
	if g.gen == g.book.gen {
		return
	}
	g.gen = g.book.gen
	n := len(g.t.view.Members)
	g.hash, g.index = g.t.hash[:n], nil
	if g.book.outs == 0 {
		return
	}
	hash, index := make([]uint64, 0, n), make([]uint16, 0, n)
	for i, m := range g.t.view.Members {
		if !g.book.isOut(m.ID) {
			hash, index = append(hash, g.t.hash[i]), append(index, uint16(i))
		}
	}
	g.hash, g.index = hash, index
}

// member returns the table's index of the i-th member that is not out.
func (g *Group) member(i int) int {
	if g.index != nil {
		return int(g.index[i])
	}
	return i
}

// above returns the packed ranks of all members, and how many of them rank above
// this node: its position in the tree. There is no branch that depends on a
// rank: half of them would be mispredicted, and cost more than all the rest.
func (g *Group) above(key Key) (s []uint64, position int) {
	b := g.book
	if cap(b.scratch) < 2*len(g.hash) {
		b.scratch = make([]uint64, 2*len(g.hash))
	}
	s = b.scratch[:len(g.hash)]
	own := rank(key, g.self) | indexMask
	for i, h := range g.hash {
		r := rank(key, h)
		s[i] = pack(r, i)
		if r > own {
			position++
		}
	}
	return s, position
}

// highest returns the n highest of s, and few or no others: ranks are as good as
// random, so their number says how high the n-th is, about.
func (g *Group) highest(s []uint64, n int) []uint64 {
	few := uint64(n + 3 + 3*isqrt(n))
	if few >= uint64(len(s)) {
		return s
	}
	limit := -(math.MaxUint64 / uint64(len(s)) * few)
	kept, k := g.book.scratch[len(s):2*len(s)], 0
	for _, r := range s {
		kept[k] = r
		if r > limit {
			k++
		}
	}
	if k < n {
		return s
	}
	return kept[:k]
}

func isqrt(n int) int { return int(math.Sqrt(float64(n))) }

// parent returns the table's index of the first candidate, -1 for none.
func (g *Group) parent(key Key) int {
	if s, i := g.above(key); i > 0 {
		p := (i - 1) / Fanout
		return g.member(indexOf(nth(g.highest(s, p+1), p)))
	}
	var buf [maxCandidates]int32
	if c := g.across(key, g.elder(key, buf[:0])); len(c) > 0 {
		return int(c[0])
	}
	return -1
}

const maxCandidates = 24

// candidates appends all members that may be asked, in order.
func (g *Group) candidates(key Key, dst []int32) []int32 {
	if s, i := g.above(key); i > 0 {
		s = g.highest(s, i)
		descending(s)
		dst = g.inCell(s[:i], dst)
	}
	return g.across(key, g.elder(key, dst))
}

// elder appends a member of the cell that may have what a root lacks: one that has the
// whole image, else the next one below, which was the root if this node came
// late. A root asks there before it asks outside of the cell, so that what those
// that were there before it have does not come from the supernode again.
func (g *Group) elder(key Key, dst []int32) []int32 {
	best, bestRank := -1, uint64(0)
	if len(g.t.full) > 0 {
		for _, i := range g.t.full {
			if r := rank(key, g.t.hash[i]); (best < 0 || r > bestRank) && g.t.hash[i] != g.self && !g.book.isOut(g.id(int(i))) {
				best, bestRank = int(i), r
			}
		}
	} else if g.book.below.ask() {
		own := rank(key, g.self)
		for i, h := range g.hash {
			if r := rank(key, h); r < own && (best < 0 || r > bestRank) {
				best, bestRank = g.member(i), r
			}
		}
	}
	if best < 0 || contains(dst, best) {
		return dst
	}
	return append(dst, int32(best))
}

// inCell appends the parent, two alternates from the parent's level, and the
// ancestors. s are the members above, in order.
func (g *Group) inCell(s []uint64, dst []int32) []int32 {
	p := (len(s) - 1) / Fanout
	lo, n := 0, 1 // the parent's level: its first position, and how many it has
	for p >= lo+n {
		lo, n = lo+n, n*Fanout
	}
	n = min(n, len(s)-lo)
	dst = g.add(dst, s[p])
	if n > 1 {
		dst = g.add(dst, s[lo+(p-lo+1)%n])
	}
	if n > 2 {
		dst = g.add(dst, s[lo+(p-lo+n-1)%n])
	}
	for p > 0 {
		p = (p - 1) / Fanout
		dst = g.add(dst, s[p])
	}
	return dst
}

func (g *Group) add(dst []int32, packed uint64) []int32 {
	return append(dst, int32(g.member(indexOf(packed))))
}

// across appends gateways that a cell's root may ask.
func (g *Group) across(key Key, dst []int32) []int32 {
	if len(g.t.view.Gateways) == 0 {
		return dst
	}
	if s := ranksAbove(g.book.scratch[:0], key, g.t.cell, len(g.t.zones[0].cells), func(i int) uint64 { return g.t.zones[0].cells[i].hash }); len(s) > 0 {
		for p, n := (len(s)-1)/Fanout, 2; ; p, n = (p-1)/Fanout, 1 {
			dst = g.gateways(dst, key, &g.t.zones[0].cells[indexOf(s[p])], n)
			if p == 0 {
				return dst
			}
		}
	}
	s := ranksAbove(g.book.scratch[:0], key, g.t.zones[0].hash, len(g.t.zones)-1, func(i int) uint64 { return g.t.zones[i+1].hash })
	if len(s) == 0 {
		return dst
	}
	for p, n := (len(s)-1)/Fanout, 2; ; p, n = (p-1)/Fanout, 1 {
		z := &g.t.zones[indexOf(s[p])+1]
		first := 0
		for i := range z.cells {
			if rank(key, z.cells[i].hash) > rank(key, z.cells[first].hash) {
				first = i
			}
		}
		dst = g.gateways(dst, key, &z.cells[first], n)
		if p == 0 {
			return dst
		}
	}
}

// ranksAbove returns the packed ranks of n things that rank above own, in order.
func ranksAbove(s []uint64, key Key, own uint64, n int, hash func(int) uint64) []uint64 {
	limit := rank(key, own) | indexMask
	for i := range n {
		if r := rank(key, hash(i)); r > limit {
			s = append(s, pack(r, i))
		}
	}
	descending(s)
	return s
}

// gateways appends the n gateways of c that rank highest and are not out.
func (g *Group) gateways(dst []int32, key Key, c *cell, n int) []int32 {
	base := len(g.t.view.Members)
	for range min(n, maxCandidates-len(dst)) {
		best, bestRank := -1, uint64(0)
		for _, i := range c.gate {
			at := base + int(i)
			r := rank(key, g.t.hash[at])
			if (best < 0 || r > bestRank) && !contains(dst, at) && !g.book.isOut(g.id(at)) {
				best, bestRank = at, r
			}
		}
		if best < 0 {
			return dst
		}
		dst = append(dst, int32(best))
	}
	return dst
}

func contains(s []int32, v int) bool {
	for _, x := range s {
		if int(x) == v {
			return true
		}
	}
	return false
}
