package swarm

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/exchange/exchangetest"
	"github.com/shoalfs/shoal/p2p/route"
)

func TestSource(t *testing.T) {
	for name, nodes := range map[string]int{"alone": 1, "four nodes": 4} {
		t.Run(name, func(t *testing.T) {
			blockdevtest.TestSource(t, func(t *testing.T, data [][]byte) blockdev.Source {
				w := newWorld(t, 1<<20)
				for _, b := range data {
					w.mem.Put(b)
				}
				for range nodes {
					w.node(options{})
				}
				return w.nodes[0].swarm
			})
		})
	}
}

// However many want it at once, the supernode sends each chunk about once: 1.1
// times on an idle machine. On one so busy that peers take a second to answer,
// more.
func TestEverybodyAtOnce(t *testing.T) {
	w := newWorld(t, 8<<20)
	for range 6 {
		w.node(options{})
	}
	w.connect()
	var wg sync.WaitGroup
	for _, n := range w.nodes {
		wg.Go(func() {
			if err := n.diff.Prefetch(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, n := range w.nodes {
		for i := range w.ix.Chunks {
			w.read(n, i)
		}
	}
	if sent := w.sent.Load(); sent > 3*int64(len(w.data)) {
		t.Errorf("the supernode has sent %d bytes of %d", sent, len(w.data))
	}
	var peers float64
	for _, n := range w.nodes {
		peers += n.metric(t, "shoal_node_received_bytes_total", "peer")
	}
	if peers < 2*float64(len(w.data)) {
		t.Errorf("peers have sent %.0f bytes", peers)
	}
}

// One after the other, by demand reads alone.
func TestRolling(t *testing.T) {
	w := newWorld(t, 2<<20)
	for range 4 {
		n := w.node(options{})
		w.connect()
		for i := range w.ix.Chunks {
			w.read(n, i)
		}
	}
	// A read that peers are slow to answer goes to the supernode as well.
	if sent := w.sent.Load(); sent > int64(len(w.data))*3/2 {
		t.Errorf("the supernode has sent %d bytes of %d", sent, len(w.data))
	}
}

// Zones: what crosses is about one copy.
func TestZones(t *testing.T) {
	w := newWorld(t, 2<<20)
	a := w.node(options{})
	for i := range w.ix.Chunks {
		w.read(a, i)
	}
	b := w.node(options{zone: "b"})
	// b's own view: its cell is itself, the other zone its gateways.
	vb := &otherSide{w}
	b.swarm.cfg.Groups = vb
	for i := range w.ix.Chunks {
		w.read(b, i)
	}
	got := b.metric(t, "shoal_node_received_bytes_total", otherZone) + b.metric(t, "shoal_node_received_bytes_total", "supernode")
	// A read that peers are slow to answer goes to the supernode as well.
	// The last chunk may be counted a moment after its reader has it.
	if got < float64(len(w.data)-blockdev.MaxChunk) || got > 1.5*float64(len(w.data)) || b.metric(t, "shoal_node_received_bytes_total", otherZone) == 0 {
		t.Errorf("%v bytes came from the other zone and the supernode, %v of these from the zone", got, b.metric(t, "shoal_node_received_bytes_total", otherZone))
	}
}

// The supernode is gone: what a peer has can still be read.
func TestWithoutSupernode(t *testing.T) {
	w := newWorld(t, 1<<20)
	for range 2 {
		w.node(options{})
	}
	for _, n := range w.nodes {
		for i := range w.ix.Chunks {
			w.read(n, i)
		}
	}
	w.down.Store(true)
	n := w.node(options{})
	var fromPeers int
	for i, c := range w.ix.Chunks {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err := n.swarm.Fetch(ctx, blockdev.Request{Diff: w.ix.DiffID, Priority: blockdev.Demand, Chunks: w.ix.Chunks[i : i+1]}, func(_ int, data []byte) error {
			if blockdev.Sum(data) != c.Digest {
				return blockdev.ErrCorrupt
			}
			return nil
		})
		cancel()
		if err == nil {
			fromPeers++
		}
	}
	// This node is the root of a third of the trees, and a root asks the
	// supernode only.
	if fromPeers == 0 || fromPeers < len(w.ix.Chunks)/3 {
		t.Errorf("%d of %d chunks came from peers", fromPeers, len(w.ix.Chunks))
	}
}

// TestFrom: a read is told whether a peer or the supernode has sent its chunk, as the
// counters of bytes say.
func TestFrom(t *testing.T) {
	w := newWorld(t, 2<<20)
	a := w.node(options{})
	fetch := func(n *node) map[blockdev.Origin]int {
		t.Helper()
		var from blockdev.Origin
		got := map[blockdev.Origin]int{}
		err := n.swarm.Fetch(t.Context(), blockdev.Request{Diff: w.ix.DiffID, Priority: blockdev.Demand, Chunks: w.ix.Chunks, From: &from}, func(int, []byte) error {
			got[from]++
			from = blockdev.FromLocal
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := fetch(a); got[blockdev.FromSupernode] != len(w.ix.Chunks) {
		t.Errorf("alone: %v of %d chunks", got, len(w.ix.Chunks))
	}
	for i := range w.ix.Chunks {
		w.read(a, i)
	}
	b := w.node(options{})
	w.connect()
	got := fetch(b)
	if got[blockdev.FromPeer] == 0 || got[blockdev.FromPeer]+got[blockdev.FromSupernode] != len(w.ix.Chunks) {
		t.Errorf("beside one that has all: %v of %d chunks", got, len(w.ix.Chunks))
	}
}

// TestProvider runs the conformance suite of exchange.Provider: for a node that has all
// of the diff, and for one that has to ask others.
func TestProvider(t *testing.T) {
	for name, complete := range map[string]bool{"complete": true, "empty": false} {
		t.Run(name, func(t *testing.T) {
			exchangetest.TestProvider(t, func(t *testing.T, ix *blockdev.Index, data []byte) (exchange.Provider, exchange.Query) {
				w := newWorldOf(t, ix, data)
				n, other := w.node(options{}), w.node(options{})
				q := exchange.Query{From: other.host.ID(), Group: theGroup, Diff: ix.DiffID}
				if complete {
					if err := n.diff.Prefetch(t.Context()); err != nil {
						t.Fatal(err)
					}
					q.Hops = route.MaxHops // nobody else is asked
				}
				return n.swarm.Provider(n.cache), q
			})
		})
	}
}
