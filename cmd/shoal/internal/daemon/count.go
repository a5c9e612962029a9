package daemon

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
)

// CountFetched wraps a source: it counts the bytes that came, by priority, and
// the requests that failed.
func CountFetched(s blockdev.Source, reg prometheus.Registerer) blockdev.Source {
	c := &counted{
		Source: s,
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "shoal_node_fetched_bytes_total", Help: "Uncompressed bytes of chunks that this node fetched.",
		}, []string{"priority"}),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "shoal_node_fetch_failures_total", Help: "Requests for chunks that were not answered in full.",
		}, []string{"priority"}),
	}
	for _, p := range []blockdev.Priority{blockdev.Demand, blockdev.Prefetch} {
		c.bytes.WithLabelValues(label(p))
		c.failed.WithLabelValues(label(p))
	}
	reg.MustRegister(c.bytes, c.failed)
	return c
}

type counted struct {
	blockdev.Source
	bytes, failed *prometheus.CounterVec
}

func label(p blockdev.Priority) string {
	if p == blockdev.Demand {
		return "demand"
	}
	return "prefetch"
}

func (c *counted) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	bytes := c.bytes.WithLabelValues(label(req.Priority))
	err := c.Source.Fetch(ctx, req, func(i int, data []byte) error {
		bytes.Add(float64(len(data)))
		return deliver(i, data)
	})
	if err != nil && ctx.Err() == nil {
		c.failed.WithLabelValues(label(req.Priority)).Inc()
	}
	return err
}
