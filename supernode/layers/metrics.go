package layers

import (
	"context"
	"errors"
	"sync"
	"time"

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

	mu      sync.Mutex
	running map[string]*ingestRun
}

// ingestRun is a layer that somebody waits for.
type ingestRun struct {
	start   time.Time
	waiters int
	seen    bool // its end has been counted
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		Set:      metric.Set{Registerer: reg},
		ingests:  outcome.Counter("shoal_supernode_layer_ingests_total", "Layers fetched from registries and stored, by outcome."),
		seconds:  metric.Seconds("shoal_supernode_layer_ingest_seconds", "Time to fetch, check and store a layer."),
		copies:   metric.Counter("shoal_supernode_layer_copies_total", "Layers copied from another supernode."),
		restores: metric.Counter("shoal_supernode_layer_restores_total", "Layers that no supernode had any more and that a node gave back."),
		running:  map[string]*ingestRun{},
	}
	return m, m.Register(m.ingests, m.seconds, m.copies, m.restores)
}

// begin counts one who waits for a layer's ingest.
func (m *metrics) begin(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.running[key]
	if r == nil {
		r = &ingestRun{start: time.Now()}
		m.running[key] = r
	}
	r.waiters++
}

// end counts an ingest by the first of its waiters to be told of its end; for
// that one, first is true. Those who leave before the end do not count.
func (m *metrics) end(key string, err error) (took time.Duration, first bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.running[key]
	if r.waiters--; r.waiters == 0 {
		delete(m.running, key)
	}
	took = time.Since(r.start)
	left := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
	if r.seen || left && r.waiters > 0 {
		return took, false
	}
	r.seen = true
	m.ingests.WithLabelValues(outcome.Of(err)).Inc()
	if err == nil {
		m.seconds.Observe(took.Seconds())
	}
	return took, true
}
