package metrics

import (
	"context"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
)

// snapshotsService is containerd's API of snapshotters.
const snapshotsService = "/containerd.services.snapshots."

// longest keeps the longest call of each method.
type longest struct {
	desc *prometheus.Desc
	mu   sync.Mutex
	m    map[string]time.Duration
}

func (l *longest) note(method string, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.m[method] = max(l.m[method], took)
}

// Describe implements prometheus.Collector.
func (l *longest) Describe(ch chan<- *prometheus.Desc) { ch <- l.desc }

// Collect implements prometheus.Collector.
func (l *longest) Collect(ch chan<- prometheus.Metric) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for method, took := range l.m {
		ch <- prometheus.MustNewConstMetric(l.desc, prometheus.GaugeValue, took.Seconds(), method)
	}
}

// calls are containerd's calls to the snapshotter.
type calls struct {
	seconds *prometheus.HistogramVec
	longest *longest
	last    atomic.Int64 // Unix nanoseconds
}

func newCalls() *calls {
	return &calls{
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "shoal_node_snapshots_seconds", Help: "Time that containerd's calls to the snapshotter took, by method. None should take 3 seconds.",
			Buckets: []float64{.001, .003, .01, .03, .1, .3, 1, 2, 3, 4, 6, 10, 30, 60, 120, 300},
		}, []string{"method"}),
		longest: &longest{m: map[string]time.Duration{}, desc: prometheus.NewDesc("shoal_node_snapshots_longest_seconds",
			"The longest of containerd's calls to the snapshotter since the node was started, by method.", []string{"method"}, nil)},
	}
}

// Calls has a server measure containerd's calls to the snapshotter: containerd holds a
// lock over most of them, and everything else waits for the calls that wait for that.
func (m *Metrics) Calls() grpc.ServerOption {
	return grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		if !strings.HasPrefix(info.FullMethod, snapshotsService) {
			return handle(ctx, req)
		}
		began := time.Now()
		m.calls.last.Store(began.UnixNano())
		resp, err := handle(ctx, req)
		method, took := path.Base(info.FullMethod), time.Since(began)
		m.calls.seconds.WithLabelValues(method).Observe(took.Seconds())
		m.calls.longest.note(method, took)
		return resp, err
	})
}

// Called returns when containerd has called the snapshotter last; zero: not yet.
func (m *Metrics) Called() time.Time {
	if n := m.calls.last.Load(); n != 0 {
		return time.Unix(0, n)
	}
	return time.Time{}
}
