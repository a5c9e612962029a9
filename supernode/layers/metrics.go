package layers

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/internal/metric"
	"github.com/shoalfs/shoal/supernode/internal/outcome"
)

type metrics struct {
	metric.Set

	ingests  *prometheus.CounterVec
	seconds  prometheus.Histogram // of ingests
	copies   prometheus.Counter
	restores prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		Set:      metric.Set{Registerer: reg},
		ingests:  outcome.Counter("shoal_supernode_layer_ingests_total", "Layers fetched from registries and stored, by outcome."),
		seconds:  metric.Seconds("shoal_supernode_layer_ingest_seconds", "Time to fetch, check and store a layer."),
		copies:   metric.Counter("shoal_supernode_layer_copies_total", "Layers copied from another supernode."),
		restores: metric.Counter("shoal_supernode_layer_restores_total", "Layers that no supernode had any more and that a node gave back."),
	}
	return m, m.Register(m.ingests, m.seconds, m.copies, m.restores)
}
