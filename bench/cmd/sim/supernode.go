package main

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/route"
)

// A layer belongs to the first of the supernodes that lives, in the order of their
// rank for it. The owner fetches it from the registry, all its layers at the
// same time, and then gives a copy to the next in that order, so that a layer that
// was fetched once is not lost with one supernode. A request for a layer that is
// on its way waits.
type layer struct {
	first, end int32 // chunks
	order      []int // supernodes
	// By supernode:
	at      []stage
	got     []int32    // chunks of the copy that came
	waiting [][]waiter // requests; next is the chunk
}

type stage uint8

const (
	absent  stage = iota
	coming        // from the registry
	copying       // from another supernode
	complete
)

// addLayers cuts the image into layers.
func (w *swarm) addLayers(r *rand.Rand) {
	shares := w.setup.layers
	if len(shares) == 0 {
		shares = []float64{1}
	}
	var names []string
	for i := range w.supers {
		names = append(names, string(rune('a'+i)))
	}
	w.layerOf = make([]int32, w.n)
	sum, from := 0.0, int32(0)
	for i, share := range shares {
		sum += share
		end := int32(sum*float64(w.n) + 0.5)
		if i == len(shares)-1 {
			end = int32(w.n)
		}
		var order []int
		for _, id := range route.Order(blockdev.Sum(binary.LittleEndian.AppendUint64(nil, r.Uint64())), names) {
			order = append(order, slices.Index(names, id))
		}
		l := layer{first: from, end: end, order: order,
			at: make([]stage, w.supers), got: make([]int32, w.supers), waiting: make([][]waiter, w.supers)}
		for c := from; c < end; c++ {
			w.layerOf[c] = int32(i)
		}
		for s := range l.at {
			if w.registry == 0 {
				l.at[s] = complete
			}
		}
		w.stock = append(w.stock, l)
		from = end
	}
}

// serve answers a request that came to supernode s.
func (w *swarm) serve(s int32, from, chunk int32, demand bool) {
	l := &w.stock[w.layerOf[chunk]]
	if l.at[s] == complete {
		w.net.send(w.super0+s, from, chunk, demand)
		return
	}
	l.waiting[s] = append(l.waiting[s], waiter{from: from, next: chunk, demand: demand})
	if l.at[s] == absent {
		w.fetchLayer(s, w.layerOf[chunk])
	}
}

// fetchLayer asks the registry for a layer; supernode s's line from the registry
// takes one after the other.
func (w *swarm) fetchLayer(s, i int32) {
	l := &w.stock[i]
	l.at[s] = coming
	w.asked++
	bytes := int64(l.end-l.first) * chunkSize
	w.fetched += bytes
	from := max(w.net.now, w.lineFree[s])
	w.lineFree[s] = from + int64(float64(8*bytes)/w.registry*1e9)
	w.net.after(w.lineFree[s]-w.net.now, evLayer, s, i, 0)
}

// layerCame has layer i complete at supernode s, from the registry or as a copy.
func (w *swarm) layerCame(s, i int32) {
	if w.net.hosts[w.super0+s].dead {
		return
	}
	l := &w.stock[i]
	copied := l.at[s] == copying
	l.at[s] = complete
	for _, q := range l.waiting[s] {
		w.net.send(w.super0+s, q.from, q.next, q.demand)
	}
	l.waiting[s] = nil
	if copied {
		return
	}
	for _, next := range l.order {
		if to := int32(next); to != s && !w.net.hosts[w.super0+to].dead && l.at[to] == absent {
			// As chunks like any other, behind what is queued already.
			l.at[to], l.got[to] = copying, 0
			for c := l.first; c < l.end; c++ {
				w.net.send(w.super0+s, w.super0+to, c, false)
			}
			return
		}
	}
}

// copyCame takes a chunk of a copy at supernode s.
func (w *swarm) copyCame(s, chunk int32) {
	l := &w.stock[w.layerOf[chunk]]
	if l.at[s] != copying {
		return
	}
	if l.got[s]++; l.got[s] == l.end-l.first {
		w.layerCame(s, w.layerOf[chunk])
	}
}

// superDied ends what supernode s was doing. A copy that it had not finished is
// fetched anew.
func (w *swarm) superDied(s int32) {
	for i := range w.stock {
		l := &w.stock[i]
		if l.at[s] == coming {
			w.inFlight += int64(l.end-l.first) * chunkSize
		}
		l.at[s] = absent
		for to := range l.at {
			if l.at[to] != copying {
				continue
			}
			l.at[to] = absent
			w.inFlight += int64(l.end-l.first) * chunkSize
			if len(l.waiting[to]) > 0 {
				w.fetchLayer(int32(to), int32(i))
			}
		}
	}
}
