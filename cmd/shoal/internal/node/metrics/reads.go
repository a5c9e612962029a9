package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
)

// reads is a histogram of reads through FUSE by where their bytes were.
type reads struct {
	*prometheus.HistogramVec
	by [blockdev.Origins]prometheus.Observer
}

func newReads() *reads {
	r := &reads{HistogramVec: prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "shoal_node_read_seconds",
		Help:    "Time from when the kernel gives out a read of a lazy image until its answer, by the farthest source of its bytes: local, peer, supernode, registry.",
		Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
	}, []string{"source"})}
	for o := range r.by {
		r.by[o] = r.WithLabelValues(blockdev.Origin(o).String())
	}
	return r
}

// Read counts a read through FUSE: volume.Config.Observe.
func (m *Metrics) Read(from blockdev.Origin, took time.Duration) {
	m.reads.by[from].Observe(took.Seconds())
}
