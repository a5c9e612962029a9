package main

import (
	"math/rand/v2"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/route"
)

// Events of a swarm.
const (
	evRequest = userEvent + iota // a: to, b: chunk, c: request
	evReset                      // a: node, b: chunk, c: the dead host
	evMissing                    // a: node, b: chunk, c: who does not have it
	evRetry                      // a: node, b: chunk
	evScan                       // a: node: looks for requests that took too long
	evJoin                       // a: node
	evDie                        // a: host, b: 1 if silently
	evLayer                      // a: supernode, b: layer
	evView                       // new views are handed out
	evLease                      // a: node that died a while ago
)

// scanEvery is how often a node looks for requests that took too long, and
// retryAfter when it begins anew after everybody has failed.
const (
	scanEvery  = 250 * time.Millisecond
	retryAfter = 100 * time.Millisecond
)

// A request event's c says who asks, and how often it was forwarded.
func packRequest(from int32, hops int) int32 { return from | int32(hops)<<24 }

func unpackRequest(c int32) (from int32, hops int) { return c & (1<<24 - 1), int(c >> 24) }

// flight is a chunk that a node has asked for.
type flight struct {
	ask     route.Ask
	group   *route.Group // that target is of
	asked   int64
	node    int32
	chunk   int32
	target  int32 // of the table, -1: supernode
	to      int32 // host
	place   int32 // in the node's list
	waiters int32 // who asked this node for it; -1: nobody
	own     bool  // counts in the node's window
	later   bool  // nobody is asked at present
	hops    int   // of the request
}

func (fl *flight) at() route.Target {
	if fl.target < 0 {
		return route.Target{Kind: route.Supernode, Index: -1}
	}
	return route.Target{Kind: route.Peer, Index: int(fl.target)}
}

type waiter struct {
	from, next int32
	demand     bool
}

type node struct {
	book    *route.Book
	group   *route.Group
	hosts   []int32 // by index of the group's table
	known   bool    // in the views
	cell    int
	flights []int32
	cursor  int32 // chunks looked at
	own     int32 // prefetches under way
	have    int32
	lost    uint8 // bit i: supernode i was found dead
	scan    bool
	joined  int64
	done    int64 // when it had everything; 0: not yet
}

// present is a chunk's state at a node that has it.
const present = -1

// swarm is one run of a setup: nodes that fetch an image from each other.
type swarm struct {
	setup
	n      int // chunks
	net    *network
	nodes  []node
	super0 int32   // the first supernode's host
	state  []int32 // node*chunks+chunk: present, 0: missing, or 1 + its flight
	keys   []route.Key
	left   int // nodes that live and are not done

	flights     []flight
	freeFlights []int32
	waiters     []waiter
	freeWaiters []int32

	random  *rand.Rand
	members []route.Member
	cells   [][]int32
	version uint64 // of the views
	viewing bool   // new ones are on their way

	stock    []layer
	layerOf  []int32  // by chunk
	lineFree [8]int64 // when a supernode's line from the registry is free

	asked, fetched, inFlight int64 // of the registry: requests, bytes; lost with a supernode
	twice                    int64 // chunks that came although they were there
	timeouts, hops           int64 // hops: the longest way
}

func (w *swarm) at(node, chunk int32) *int32 { return &w.state[int(node)*w.n+int(chunk)] }

// run plays until everybody who lives has everything, or nothing happens any more.
func (w *swarm) run() error {
	for w.left > 0 {
		e, ok := w.net.next()
		if !ok {
			return nil
		}
		switch e.kind {
		case arrival:
			if e.a >= w.super0 {
				w.copyCame(e.a-w.super0, e.b)
			} else {
				w.arrived(e.a, e.b)
			}
		case evRequest:
			w.requested(e)
		case evReset:
			w.failed(e.a, e.b, e.c, route.Dead)
		case evMissing:
			w.failed(e.a, e.b, e.c, route.Missing)
		case evRetry:
			if st := *w.at(e.a, e.b); st > 0 && w.flights[st-1].later && !w.net.hosts[e.a].dead {
				w.ask(st - 1)
			}
		case evScan:
			w.scan(e.a)
		case evJoin:
			if err := w.join(e.a); err != nil {
				return err
			}
		case evDie:
			w.die(e.a, e.b == 1)
		case evLayer:
			if w.stock[e.b].at[e.a] == coming {
				w.layerCame(e.a, e.b)
			}
		case evView:
			w.viewing = false
			if err := w.giveViews(); err != nil {
				return err
			}
		case evLease:
			w.know(e.a, false)
		}
	}
	return nil
}

// room is how many more prefetches a node may have under way.
func (w *swarm) room(n *node) int32 {
	if w.window > 0 {
		return int32(w.window) - n.own
	}
	var table *route.Table
	if n.group != nil {
		table = n.group.Table()
	}
	return int32(table.Inflight()/chunkSize) - n.own
}

// prefetch asks for more until the window is full.
func (w *swarm) prefetch(i int32) {
	n := &w.nodes[i]
	for room := w.room(n); room > 0 && int(n.cursor) < w.n; {
		c := n.cursor
		n.cursor++
		switch st := *w.at(i, c); {
		case st == 0:
			n.own++
			room--
			w.depart(i, c, 0, true)
		case st > 0 && !w.flights[st-1].own:
			// Asked for already, for somebody else.
			w.flights[st-1].own = true
			n.own++
			room--
		}
	}
}

// depart begins to look for a chunk.
func (w *swarm) depart(i, chunk int32, hops int, own bool) int32 {
	var f int32
	if k := len(w.freeFlights); k > 0 {
		f, w.freeFlights = w.freeFlights[k-1], w.freeFlights[:k-1]
	} else {
		f = int32(len(w.flights))
		w.flights = append(w.flights, flight{})
	}
	n := &w.nodes[i]
	w.flights[f] = flight{ask: route.AskKey(w.keys[chunk], blockdev.Prefetch, hops), node: i, chunk: chunk, place: int32(len(n.flights)), waiters: -1, own: own}
	n.flights = append(n.flights, f)
	*w.at(i, chunk) = f + 1
	w.hops = max(w.hops, int64(hops))
	w.ask(f)
	return f
}

// ask sends a request to whoever is next.
func (w *swarm) ask(f int32) {
	fl := &w.flights[f]
	n := &w.nodes[fl.node]
	fl.asked, fl.later = w.net.now, false
	t := route.Target{Kind: route.Supernode, Index: -1}
	switch {
	case w.parent == nil:
		t = n.group.Next(&fl.ask, time.Duration(w.net.now))
	case w.parent(int(fl.node)) >= 0:
		t = route.Target{Kind: route.Peer, Index: w.parent(int(fl.node))}
	}
	if !n.scan {
		n.scan = true
		w.net.after(int64(scanEvery), evScan, fl.node, 0, 0)
	}
	fl.target, fl.group, fl.hops = int32(t.Index), n.group, t.Hops
	switch t.Kind {
	case route.Peer:
		if fl.to = fl.target; n.hosts != nil {
			fl.to = n.hosts[t.Index]
		}
		w.request(fl)
	case route.Supernode:
		w.askSuper(fl)
	case route.Later:
		fl.later = true
		w.net.after(int64(t.Wait), evRetry, fl.node, fl.chunk, 0)
	case route.Nobody:
		w.beginAnew(fl)
	}
}

// askSuper asks the layer's supernode, or the next one if it is known to be dead.
func (w *swarm) askSuper(fl *flight) {
	for _, s := range w.stock[w.layerOf[fl.chunk]].order {
		if w.nodes[fl.node].lost>>s&1 == 0 {
			fl.to = w.super0 + int32(s)
			w.request(fl)
			return
		}
	}
	w.beginAnew(fl)
}

func (w *swarm) beginAnew(fl *flight) {
	fl.later = true
	fl.ask = route.AskKey(w.keys[fl.chunk], blockdev.Prefetch, fl.ask.Hops())
	w.net.after(int64(retryAfter), evRetry, fl.node, fl.chunk, 0)
}

func (w *swarm) request(fl *flight) {
	w.net.after(w.net.delay(fl.node, fl.to), evRequest, fl.to, fl.chunk, packRequest(fl.node, fl.hops))
}

// requested takes a request: the chunk is sent, or waited for with whoever waits
// for it already.
func (w *swarm) requested(e event) {
	from, hops := unpackRequest(e.c)
	switch {
	case w.net.hosts[e.a].dead:
		if !w.net.hosts[e.a].silent {
			w.net.after(w.net.delay(e.a, from), evReset, from, e.b, e.a)
		}
		return
	case e.a >= w.super0:
		w.serve(e.a-w.super0, from, e.b, false)
		return
	}
	st := *w.at(e.a, e.b)
	if st == present {
		w.net.send(e.a, from, e.b, false)
		return
	}
	if hops >= route.MaxHops {
		w.net.after(w.net.delay(e.a, from), evMissing, from, e.b, e.a)
		return
	}
	f := st - 1
	if st == 0 {
		f = w.depart(e.a, e.b, hops, false)
	}
	var k int32
	if m := len(w.freeWaiters); m > 0 {
		k, w.freeWaiters = w.freeWaiters[m-1], w.freeWaiters[:m-1]
	} else {
		k = int32(len(w.waiters))
		w.waiters = append(w.waiters, waiter{})
	}
	w.waiters[k] = waiter{from: from, next: w.flights[f].waiters}
	w.flights[f].waiters = k
}

// failed is what a node learns when the host that it asked is dead, or does not
// have the chunk.
func (w *swarm) failed(i, chunk, host int32, o route.Outcome) {
	st := *w.at(i, chunk)
	if st <= 0 || w.net.hosts[i].dead {
		return
	}
	fl := &w.flights[st-1]
	if fl.later || fl.to != host {
		return
	}
	if host >= w.super0 {
		w.nodes[i].lost |= 1 << (host - w.super0)
		w.askSuper(fl)
		return
	}
	w.report(fl, o)
	w.ask(st - 1)
}

func (w *swarm) report(fl *flight, o route.Outcome) {
	if g := fl.group; g != nil {
		now := time.Duration(w.net.now)
		g.Report(&fl.ask, fl.at(), o, now, now-time.Duration(fl.asked), chunkSize)
	}
}

// arrived takes a chunk and passes it on to those who wait for it.
func (w *swarm) arrived(i, chunk int32) {
	st := w.at(i, chunk)
	if *st <= 0 {
		w.twice++
		return
	}
	f := *st - 1
	*st = present
	fl := &w.flights[f]
	n := &w.nodes[i]
	w.report(fl, route.OK)
	for k := fl.waiters; k >= 0; {
		wt := w.waiters[k]
		w.net.send(i, wt.from, chunk, wt.demand)
		w.freeWaiters = append(w.freeWaiters, k)
		k = wt.next
	}
	last := n.flights[len(n.flights)-1]
	n.flights[fl.place] = last
	w.flights[last].place = fl.place
	n.flights = n.flights[:len(n.flights)-1]
	if fl.own {
		n.own--
	}
	w.freeFlights = append(w.freeFlights, f)
	if n.have++; int(n.have) == w.n {
		n.done = w.net.now
		w.left--
		w.full(i)
	}
	w.prefetch(i)
}

// scan gives up requests that took too long.
func (w *swarm) scan(i int32) {
	n := &w.nodes[i]
	n.scan = false
	if w.net.hosts[i].dead || len(n.flights) == 0 || n.group == nil {
		return
	}
	n.scan = true
	w.net.after(int64(scanEvery), evScan, i, 0, 0)
	now := time.Duration(w.net.now)
	_, giveUp := n.book.Patience(false)
	for _, f := range n.flights {
		fl := &w.flights[f]
		if fl.later || fl.to >= w.super0 || now-time.Duration(fl.asked) < giveUp && w.nodes[fl.to].known {
			continue
		}
		w.timeouts++
		w.report(fl, route.Slow)
		w.ask(f)
	}
}

// die takes a host away. Whoever waits for it learns of it, unless it goes silently.
func (w *swarm) die(h int32, silent bool) {
	if w.net.hosts[h].dead {
		return
	}
	w.net.hosts[h].dead, w.net.hosts[h].silent = true, silent
	if h >= w.super0 {
		w.superDied(h - w.super0)
	} else {
		w.net.after(int64(lease), evLease, h, 0, 0)
		if w.nodes[h].done == 0 {
			w.left--
		}
	}
	if silent {
		return
	}
	for i := range w.nodes {
		for _, f := range w.nodes[i].flights {
			if fl := &w.flights[f]; fl.to == h && !fl.later {
				w.net.after(w.net.delay(h, fl.node), evReset, fl.node, fl.chunk, h)
			}
		}
	}
}
