package main

import (
	"math/bits"
	"math/rand/v2"
	"time"
)

// Events of a mesh.
const (
	evHave = userEvent + iota // a: node, b: place of a neighbour that has something new
	evWant                    // a: node, b: chunk, c: who wants it
)

// Kraken's figures: about ten neighbours, three requests at a time to each, five
// to an origin. What is not as there is in Kraken's favour: its pieces have 4 MB,
// here they are chunks; what neighbours have is known without messages; nobody
// waits for a tracker.
const (
	meshDegree  = 10
	meshPeer    = 3
	meshOrigin  = 5
	meshOrigins = 10 // neighbours of the supernode
)

// mesh is the baseline of a random regular graph with rarest-first (Kraken).
type mesh struct {
	setup
	n      int
	net    *network
	peers  []meshNode
	random *rand.Rand
	left   int
}

type meshNode struct {
	near   []int32  // neighbours
	under  []uint8  // requests under way to each
	have   []uint64 // bits
	wanted []uint64 // bits: missing, and not asked for
	rare   []uint8  // by chunk: neighbours that have it
	count  int
	done   int64
}

func newMesh(s setup) *mesh {
	m := &mesh{setup: s, n: s.chunks(), net: newNetwork(chunkSize, latencies), random: rand.New(rand.NewPCG(s.seed, 11)), left: s.nodes}
	words := (m.n + 63) / 64
	for i := range s.nodes + 1 {
		rate := s.link
		if i == s.nodes {
			rate = s.super
		}
		m.net.addHost(0, rate, rate)
		p := meshNode{have: make([]uint64, words), wanted: make([]uint64, words), rare: make([]uint8, m.n)}
		for c := range m.n {
			if i == s.nodes {
				p.have[c/64] |= 1 << (c % 64)
			} else {
				p.wanted[c/64] |= 1 << (c % 64)
			}
		}
		m.peers = append(m.peers, p)
	}
	// Rings in random order: each gives everybody two neighbours.
	for range meshDegree / 2 {
		order := m.random.Perm(s.nodes)
		for i, a := range order {
			m.join(a, order[(i+1)%len(order)])
		}
	}
	for _, a := range m.random.Perm(s.nodes)[:min(meshOrigins, s.nodes)] {
		m.join(a, s.nodes)
		for c := range m.n {
			m.peers[a].rare[c]++
		}
	}
	return m
}

func (m *mesh) join(a, b int) {
	if a == b {
		return
	}
	for _, o := range m.peers[a].near {
		if int(o) == b {
			return
		}
	}
	for _, e := range [2][2]int{{a, b}, {b, a}} {
		p := &m.peers[e[0]]
		p.near, p.under = append(p.near, int32(e[1])), append(p.under, 0)
	}
}

func (m *mesh) run() {
	for i := range m.nodes {
		for k, o := range m.peers[i].near {
			if int(o) == m.nodes {
				m.net.after(int64(m.random.IntN(int(time.Millisecond))), evHave, int32(i), int32(k), 0)
			}
		}
	}
	for m.left > 0 {
		e, ok := m.net.next()
		if !ok {
			return
		}
		switch e.kind {
		case arrival:
			m.arrived(e.a, e.b, e.c)
		case evHave:
			m.ask(e.a, e.b)
		case evWant:
			m.net.send(e.a, e.c, e.b, false)
		}
	}
}

// ask requests from neighbour k what is rarest.
func (m *mesh) ask(i, k int32) {
	p := &m.peers[i]
	from := p.near[k]
	limit := uint8(meshPeer)
	if int(from) == m.nodes {
		limit = meshOrigin
	}
	for p.under[k] < limit {
		c := m.rarest(p, &m.peers[from])
		if c < 0 {
			return
		}
		p.wanted[c/64] &^= 1 << (c % 64)
		p.under[k]++
		m.net.after(m.net.delay(i, from), evWant, from, int32(c), i)
	}
}

// rarest returns the chunk that o has, p wants and the fewest neighbours have,
// beginning at a random place among equals; -1 for none.
func (m *mesh) rarest(p, o *meshNode) int {
	best, rare := -1, uint8(255)
	first := m.random.IntN(len(p.wanted))
	for w := range p.wanted {
		at := w + first
		if at >= len(p.wanted) {
			at -= len(p.wanted)
		}
		for b := p.wanted[at] & o.have[at]; b != 0; b &= b - 1 {
			if c := at*64 + bits.TrailingZeros64(b); p.rare[c] < rare {
				best, rare = c, p.rare[c]
			}
		}
	}
	return best
}

func (m *mesh) arrived(i, chunk, from int32) {
	p := &m.peers[i]
	p.have[chunk/64] |= 1 << (chunk % 64)
	if p.count++; p.count == m.n {
		p.done = m.net.now
		m.left--
	}
	for k, o := range p.near {
		if o == from {
			p.under[k]--
			m.ask(i, int32(k))
		}
		if int(o) == m.nodes {
			continue
		}
		q := &m.peers[o]
		q.rare[chunk]++
		if q.wanted[chunk/64]>>(chunk%64)&1 == 0 {
			continue
		}
		for j, back := range q.near {
			if back == i && q.under[j] < meshPeer {
				m.net.after(m.net.delay(i, o), evHave, o, int32(j), 0)
			}
		}
	}
}

// playMesh runs the baseline to its end.
func playMesh(s setup) result {
	m := newMesh(s)
	m.run()
	w := swarm{setup: s, n: m.n, net: m.net, super0: int32(s.nodes), nodes: make([]node, s.nodes)}
	for i := range w.nodes {
		w.nodes[i].done = m.peers[i].done
	}
	return w.result()
}
