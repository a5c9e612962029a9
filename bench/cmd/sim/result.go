package main

import (
	"math"
	"slices"
)

// result is what became of a run. Times are over the ideal, the image's size over
// the link's rate; bytes are over the image's size.
type result struct {
	times      []float64 // of nodes that live, ascending; those that never finished are absent
	unfinished int
	egress     float64   // of all supernodes
	copied     float64   // of that, copies from supernode to supernode
	upload     []float64 // of nodes, ascending
	cross      float64   // bytes into a zone from others: the zone with the most
	registry   float64   // bytes
	requests   int64     // to the registry
	inFlight   float64   // bytes that a supernode took with it
	hops       int64
	duplicates float64 // chunks that came twice, over all
	events     uint64
}

func (w *swarm) result() result {
	r := result{registry: float64(w.fetched) / float64(w.n*chunkSize), requests: w.asked, hops: w.hops, events: w.net.queue.seq}
	r.inFlight = float64(w.inFlight) / float64(w.n*chunkSize)
	cross := make([]int64, w.zones)
	var all int64
	for i := range w.nodes {
		n, h := &w.nodes[i], &w.net.hosts[i]
		cross[h.zone] += h.crossed
		all += h.chunks
		r.upload = append(r.upload, float64(h.sent)/float64(w.n))
		switch {
		case n.done > 0:
			r.times = append(r.times, float64(n.done-n.joined)/1e9/w.ideal())
		case !h.dead:
			r.unfinished++
		}
	}
	for s := w.super0; int(s) < len(w.net.hosts); s++ {
		r.egress += float64(w.net.hosts[s].sent) / float64(w.n)
		r.copied += float64(w.net.hosts[s].chunks) / float64(w.n)
	}
	r.cross = float64(slices.Max(cross)) / float64(w.n)
	r.duplicates = float64(w.twice) / float64(max(all, 1))
	slices.Sort(r.times)
	slices.Sort(r.upload)
	return r
}

// play runs a setup to its end.
func play(s setup) (result, error) {
	w, err := newSwarm(s)
	if err != nil {
		return result{}, err
	}
	if err := w.run(); err != nil {
		return result{}, err
	}
	return w.result(), nil
}

// quantile returns the q-th quantile of sorted s: the least value that a share of q
// is not above.
func quantile(s []float64, q float64) float64 {
	if len(s) == 0 {
		return 0
	}
	return s[min(max(int(math.Ceil(q*float64(len(s))))-1, 0), len(s)-1)]
}
