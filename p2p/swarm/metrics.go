package swarm

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/p2p/route"
)

const (
	sameZone  = "same"
	otherZone = "other"
)

// metrics count what came from where, and what went wrong.
type metrics struct {
	reg       prometheus.Registerer
	peer      map[string]prometheus.Counter // bytes by zone
	supernode prometheus.Counter
	indexes   prometheus.Counter
	failures  map[route.Outcome]prometheus.Counter
	hedges    prometheus.Counter
	twice     prometheus.Counter
	refused   prometheus.Counter
	forwarded prometheus.Counter
	all       []prometheus.Collector
}

func newMetrics(reg prometheus.Registerer, s *Swarm) (*metrics, error) {
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "shoal_node_received_bytes_total",
		Help: "Bytes of chunks, uncompressed, by who sent them and in which zone that is.",
	}, []string{"source", "zone"})
	failures := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "shoal_node_peer_failures_total",
		Help: "Chunks that a peer was asked for in vain, by reason. All of them came from elsewhere.",
	}, []string{"reason"})
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		reg:       reg,
		peer:      map[string]prometheus.Counter{sameZone: bytes.WithLabelValues("peer", sameZone), otherZone: bytes.WithLabelValues("peer", otherZone)},
		supernode: bytes.WithLabelValues("supernode", ""),
		failures:  map[route.Outcome]prometheus.Counter{},
		indexes:   counter("shoal_node_relayed_index_bytes_total", "Bytes of indexes that came from other nodes."),
		hedges:    counter("shoal_node_hedges_total", "Chunks of demand reads that were asked for a second time because the first peer was slow."),
		twice:     counter("shoal_node_duplicate_bytes_total", "Bytes of chunks that came a second time and were thrown away."),
		refused:   counter("shoal_node_refused_requests_total", "Requests from peers that are not in the group they named."),
		forwarded: counter("shoal_node_forwarded_chunks_total", "Chunks that peers asked for and this node had to get first."),
	}
	for o, reason := range map[route.Outcome]string{
		route.Busy: "busy", route.Missing: "missing", route.Slow: "slow", route.Dead: "dead", route.Corrupt: "corrupt",
	} {
		m.failures[o] = failures.WithLabelValues(reason)
	}
	m.all = []prometheus.Collector{
		bytes, failures, m.indexes, m.hedges, m.twice, m.refused, m.forwarded,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "shoal_node_peers", Help: "Peers that this node keeps connections to for asking."},
			func() float64 { return float64(s.pool.len()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "shoal_node_peers_out", Help: "Peers that are left out for a while because they failed."},
			func() float64 { return float64(s.book.Outs(s.now())) }),
	}
	if reg == nil {
		return m, nil
	}
	for i, c := range m.all {
		if err := reg.Register(c); err != nil {
			for _, c := range m.all[:i] {
				reg.Unregister(c)
			}
			return nil, fmt.Errorf("swarm metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) unregister() {
	if m.reg != nil {
		for _, c := range m.all {
			m.reg.Unregister(c)
		}
	}
}
