// Package metric makes and registers Prometheus metrics, one way for all packages. A
// package's metrics are a struct that embeds a Set.
package metric

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// Set is what one owner has registered. It is not for use by several goroutines.
type Set struct {
	// Registerer; if nil, then metrics count and no scrape sees them.
	Registerer prometheus.Registerer

	registered []prometheus.Collector
}

// Register registers all of these or, if it returns an error, none.
func (s *Set) Register(all ...prometheus.Collector) error {
	if s.Registerer == nil {
		return nil
	}
	for i, c := range all {
		if err := s.Registerer.Register(c); err != nil {
			for _, done := range all[:i] {
				s.Registerer.Unregister(done)
			}
			return fmt.Errorf("register metrics: %w", err)
		}
	}
	s.registered = append(s.registered, all...)
	return nil
}

// Unregister takes all of them back.
func (s *Set) Unregister() {
	for _, c := range s.registered {
		s.Registerer.Unregister(c)
	}
	s.registered = nil
}

// Counter is a counter without labels.
func Counter(name, help string) prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
}

// CounterVec is a counter with labels.
func CounterVec(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
}

// Gauge is a gauge without labels. value is called at each scrape.
func Gauge(name, help string, value func() int) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(value()) })
}

// Seconds is a histogram of times from 5 ms to 2 minutes.
func Seconds(name, help string) prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(0.005, 2.5, 12)})
}
