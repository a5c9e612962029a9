package swarm

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/internal/metric"
	"github.com/shoalfs/shoal/p2p/route"
)

const (
	sameZone  = "same"
	otherZone = "other"
)

// metrics count what came from where, and what went wrong.
type metrics struct {
	metric.Set
	peer      map[string]prometheus.Counter // bytes by zone
	supernode prometheus.Counter
	indexes   prometheus.Counter
	failures  map[route.Outcome]prometheus.Counter
	hedges    prometheus.Counter
	twice     prometheus.Counter
	refused   prometheus.Counter
	forwarded prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, s *Swarm) (*metrics, error) {
	bytes := metric.CounterVec("shoal_node_received_bytes_total",
		"Uncompressed bytes of received chunks, by source, and by the zone of the source.", "source", "zone")
	failures := metric.CounterVec("shoal_node_peer_failures_total",
		"Chunks that a peer did not deliver, by reason. Other sources were asked for all of them.", "reason")
	m := &metrics{
		Set:       metric.Set{Registerer: reg},
		peer:      map[string]prometheus.Counter{sameZone: bytes.WithLabelValues("peer", sameZone), otherZone: bytes.WithLabelValues("peer", otherZone)},
		supernode: bytes.WithLabelValues("supernode", ""),
		failures:  map[route.Outcome]prometheus.Counter{},
		indexes:   metric.Counter("shoal_node_relayed_index_bytes_total", "Bytes of indexes that came from other nodes."),
		hedges:    metric.Counter("shoal_node_hedges_total", "Chunks of demand reads that were requested a second time because the first peer was slow."),
		twice:     metric.Counter("shoal_node_duplicate_bytes_total", "Bytes of chunks that came a second time and were thrown away."),
		refused:   metric.Counter("shoal_node_refused_requests_total", "Requests from peers that are not in the group they named."),
		forwarded: metric.Counter("shoal_node_forwarded_chunks_total", "Chunks that peers requested and that this node had to fetch first."),
	}
	for o, reason := range map[route.Outcome]string{
		route.Busy: "busy", route.Missing: "missing", route.Slow: "slow", route.Dead: "dead", route.Corrupt: "corrupt",
	} {
		m.failures[o] = failures.WithLabelValues(reason)
	}
	return m, m.Register(
		bytes, failures, m.indexes, m.hedges, m.twice, m.refused, m.forwarded,
		metric.Gauge("shoal_node_peers", "Peers that this node keeps connections to, for its requests.", s.pool.len),
		metric.Gauge("shoal_node_peers_out", "Peers that are left out for a while because they failed.", func() int { return s.book.Outs(s.now()) }),
	)
}
