package main

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/shoalfs/shoal/p2p/route"
)

// The network of all scenarios: one-way latencies within a zone and between zones.
var latencies = [2]time.Duration{150 * time.Microsecond, 500 * time.Microsecond}

const (
	chunkSize = 64 << 10 // bytes, of all chunks
	gateways  = 8        // per foreign cell and view
	viewsEach = 8        // different sets of gateways per cell

	viewEvery = 200 * time.Millisecond // between two versions of the views
	lease     = 3 * time.Second        // after which a dead node is not in them any more
)

// setup describes a swarm that fetches one image.
type setup struct {
	seed   uint64
	nodes  int
	zones  int
	cell   int     // members of a cell at most
	image  int     // bytes
	link   float64 // bits/s, each way, of a node
	super  float64 // bits/s, of a supernode
	supers int
	// registry is the rate at which one supernode ingests, in bits/s; 0: the
	// supernodes have the image. layers are the layers' shares of the image.
	registry float64
	layers   []float64
	// spread is over how long the nodes come, after the first of them.
	spread time.Duration
	// hidden is which part of the members a node's view lacks.
	hidden float64
	// kill are hosts that go, and when: nodes by number, supernodes after them.
	kill []death
	// parent replaces route (and views): whom a node asks for everything (-1: the supernode).
	// nil: route decides.
	parent func(node int) int
	// window replaces the daemon's window, in chunks.
	window int
}

// death is that of a host. If it is silent, nobody is told; otherwise whoever
// talks to it is (the connection is reset).
type death struct {
	host   int
	at     time.Duration
	silent bool
}

func (s *setup) chunks() int { return (s.image + chunkSize - 1) / chunkSize }

// ideal is how long the image takes on one link.
func (s *setup) ideal() float64 { return float64(s.chunks()) * chunkSize * 8 / s.link }

func newSwarm(s setup) (*swarm, error) {
	w := &swarm{setup: s, n: s.chunks(), net: newNetwork(chunkSize, latencies)}
	r := rand.New(rand.NewPCG(s.seed, 7))
	for range w.n {
		w.keys = append(w.keys, route.Key(r.Uint64()))
	}
	w.nodes = make([]node, s.nodes)
	w.state = make([]int32, s.nodes*w.n)
	w.super0 = int32(s.nodes)
	w.place()
	for range s.supers {
		w.net.addHost(0, s.super, s.super)
	}
	w.addLayers(r)
	w.random = r
	if w.parent == nil {
		if err := w.giveViews(); err != nil {
			return nil, err
		}
	}
	for i := range w.nodes {
		w.net.after(r.Int64N(int64(s.spread+2*time.Millisecond)), evJoin, int32(i), 0, 0)
	}
	for _, d := range s.kill {
		silent := int32(0)
		if d.silent {
			silent = 1
		}
		w.net.after(int64(d.at), evDie, int32(d.host), silent, 0)
	}
	w.left = s.nodes
	return w, nil
}

// place gives each node a zone and a cell. Those who come later are not known yet.
func (w *swarm) place() {
	perZone := (w.setup.nodes + w.zones - 1) / w.zones
	for z := range w.zones {
		size := min(perZone, w.setup.nodes-z*perZone)
		k := (size + w.cell - 1) / w.cell
		first := len(w.cells)
		for i := range size {
			if i < k {
				w.cells = append(w.cells, nil)
			}
			c, host := first+i%k, int32(len(w.members))
			w.cells[c] = append(w.cells[c], host)
			w.members = append(w.members, route.Member{ID: fmt.Sprintf("node-%d-%d", w.seed, host), Zone: fmt.Sprint("zone-", z), Cell: uint32(i % k)})
			w.net.addHost(z, w.link, w.link)
			n := &w.nodes[host]
			n.cell = c
			n.known, n.book = w.spread == 0, route.NewBook(route.BookOptions{})
		}
	}
}

// giveViews hands out views of those who are known.
func (w *swarm) giveViews() error {
	w.version++
	for own, cell := range w.cells {
		n := min(viewsEach, len(cell))
		if w.hidden > 0 {
			n = len(cell)
		}
		for first := range n {
			t, hosts, err := w.view(own)
			if err != nil {
				return err
			}
			for i := first; i < len(cell); i += n {
				w.give(cell[i], t, hosts)
			}
		}
	}
	return nil
}

func (w *swarm) give(i int32, t *route.Table, hosts []int32) {
	w.nodes[i].group, w.nodes[i].hosts = route.NewGroup(w.members[i], t, w.nodes[i].book), hosts
}

// view makes a view for a member of a cell: of that cell in full, and of gateways
// of the others. hosts are the members, by their index in the table.
func (w *swarm) view(own int) (t *route.Table, hosts []int32, err error) {
	cell := w.cells[own]
	v := route.View{Version: w.version, Zone: w.members[cell[0]].Zone, Cell: w.members[cell[0]].Cell}
	for _, m := range cell {
		if w.nodes[m].known && (w.hidden == 0 || w.random.Float64() >= w.hidden) {
			v.Members, hosts = append(v.Members, w.members[m]), append(hosts, m)
		}
	}
	for other, o := range w.cells {
		if other == own {
			continue
		}
		left := gateways
		for _, i := range w.random.Perm(len(o)) {
			if left > 0 && w.nodes[o[i]].known {
				left--
				v.Gateways, hosts = append(v.Gateways, w.members[o[i]]), append(hosts, o[i])
			}
		}
	}
	t, err = route.NewTable(v)
	return t, hosts, err
}

// join lets a node begin. One that comes late gets a view of its own with the
// image; the others hear of it a little later.
func (w *swarm) join(i int32) error {
	n := &w.nodes[i]
	n.joined = w.net.now
	if !n.known && w.parent == nil {
		t, hosts, err := w.view(n.cell)
		if err != nil {
			return err
		}
		w.give(i, t, hosts)
		w.know(i, true)
	}
	w.prefetch(i)
	return nil
}

// know changes who is in the views, which are handed out a little later, together
// with other changes.
func (w *swarm) know(i int32, known bool) {
	if w.nodes[i].known == known {
		return
	}
	w.nodes[i].known = known
	w.changed()
}

// full has a node tell that it has the whole image.
func (w *swarm) full(i int32) {
	w.members[i].Full = true
	if w.spread > 0 {
		w.changed()
	}
}

func (w *swarm) changed() {
	if !w.viewing {
		w.viewing = true
		w.net.after(int64(viewEvery), evView, 0, 0, 0)
	}
}
