package supernode

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/internal/metric"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/store"
)

// metrics are a supernode's. None is labelled with digests, images or peers:
// that would be a series for each of them.
type metrics struct {
	metric.Set

	registryBytes prometheus.Counter
	images        *prometheus.CounterVec
	imageSeconds  prometheus.Histogram
	relayed       prometheus.Counter
	documents     *prometheus.CounterVec
	ingests       *prometheus.CounterVec
	ingestSeconds prometheus.Histogram
	copies        prometheus.Counter
	restores      prometheus.Counter
	chunks        *prometheus.CounterVec
	chunkBytes    prometheus.Counter
	profiles      prometheus.Counter

	mu      sync.Mutex
	running map[string]*ingestRun
}

// ingestRun is a layer that somebody waits for.
type ingestRun struct {
	start   time.Time
	waiters int
	seen    bool // its end has been counted
}

const namespace = "shoal_supernode"

func newMetrics(reg prometheus.Registerer, stats func() store.Stats) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return metric.Counter(namespace+"_"+name, help)
	}
	byOutcome := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, []string{"outcome"})
	}
	seconds := func(name, help string) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: namespace, Name: name, Help: help,
			Buckets: prometheus.ExponentialBuckets(0.005, 2.5, 12)})
	}
	m := &metrics{
		Set:           metric.Set{Registerer: reg},
		running:       map[string]*ingestRun{},
		registryBytes: counter("registry_bytes_total", "Bytes of answers received from registries."),
		images:        byOutcome("image_requests_total", "Requests for the indexes of an image, by outcome."),
		imageSeconds:  seconds("image_request_seconds", "Time until the indexes of an image were sent."),
		relayed:       counter("relayed_images_total", "Answers that named other nodes instead of the indexes."),
		documents:     byOutcome("document_requests_total", "Requests for manifests and configs, by outcome."),
		ingests:       byOutcome("layer_ingests_total", "Layers fetched from registries and stored, by outcome."),
		ingestSeconds: seconds("layer_ingest_seconds", "Time to fetch, check and store a layer."),
		copies:        counter("layer_copies_total", "Layers copied from another supernode."),
		restores:      counter("layer_restores_total", "Layers that no supernode had any more and that a node gave back."),
		chunks:        byOutcome("chunk_requests_total", "Requested chunks, by outcome."),
		chunkBytes:    counter("chunk_bytes_total", "Bytes of chunks that were sent, as stored."),
		profiles:      counter("startup_profiles_total", "Accepted reports of the chunks that a container read at its start, one for each layer."),
	}
	return m, m.Register(m.registryBytes, m.images, m.imageSeconds, m.relayed, m.documents, m.ingests, m.ingestSeconds, m.copies, m.restores, m.chunks, m.chunkBytes, m.profiles,
		newStoreCollector(stats))
}

// watch adds the gauges of what is limited in s, whose parts are open.
func (m *metrics) watch(s *Supernode, download *pace.Pacer) error {
	ingest := func(i int) func() blockdev.Use {
		return func() blockdev.Use {
			large, small, spool := s.ingest.Uses()
			return [...]blockdev.Use{large, small, spool}[i]
		}
	}
	return m.Register(
		metric.Uses(namespace+"_places", "Places for work: ingests of layers over 8 MiB and of small ones, layers that are verified (fetched again) or restored from nodes. "+
			"If used is above capacity, then registries without a layer under way got one more.", map[string]func() blockdev.Use{
			"ingests": ingest(0), "small_ingests": ingest(1), "verifying": s.verifying.Use, "restoring": s.restoring.Use,
		}),
		metric.Uses(namespace+"_bytes", "Bytes that layers under way may take of the spool, and bytes of layers that wait for registry.max_download (capacity: bytes a second).",
			map[string]func() blockdev.Use{
				"spool": ingest(2),
				"download": func() blockdev.Use {
					w := download.Waiting()
					return blockdev.Use{Waiting: w[0] + w[1] + w[2], Capacity: download.Rate()}
				},
			}),
	)
}

func (m *metrics) received(n int64) { m.registryBytes.Add(float64(n)) }

func (m *metrics) image(err error, d time.Duration) {
	m.images.WithLabelValues(outcome(err)).Inc()
	if err == nil {
		m.imageSeconds.Observe(d.Seconds())
	}
}

func (m *metrics) document(err error) { m.documents.WithLabelValues(outcome(err)).Inc() }

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
	m.ingests.WithLabelValues(outcome(err)).Inc()
	if err == nil {
		m.ingestSeconds.Observe(took.Seconds())
	}
	return took, true
}

func (m *metrics) chunk(err error, n int) {
	m.chunks.WithLabelValues(outcome(err)).Inc()
	m.chunkBytes.Add(float64(n))
}

// outcome is the label for an error: one of ten.
func outcome(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "canceled"
	case registry.NotAllowed(err):
		return "not_allowed"
	case errors.Is(err, blockdev.ErrUnauthorized):
		return "unauthorized"
	case errors.Is(err, blockdev.ErrUnavailable):
		return "unavailable"
	case errors.Is(err, blockdev.ErrNoSpace):
		return "no_space"
	case errors.Is(err, blockdev.ErrCorrupt):
		return "corrupt"
	case errors.Is(err, blockdev.ErrUnsupported):
		return "unsupported"
	case errors.Is(err, blockdev.ErrNotFound):
		return "not_found"
	}
	return "error"
}

// storeCollector reads the store's counters when somebody looks.
type storeCollector struct {
	stats func() store.Stats
	descs []*prometheus.Desc
}

// storeMetrics are name, help, type and value.
var storeMetrics = []struct {
	name, help string
	kind       prometheus.ValueType
	value      func(store.Stats) int64
}{
	{"store_bytes", "Bytes on disk that the store uses.", prometheus.GaugeValue, func(s store.Stats) int64 { return s.Used }},
	{"uncompressed_bytes", "Bytes of chunks in the store that are still to be compressed.", prometheus.GaugeValue, func(s store.Stats) int64 { return s.DueBytes }},
	{"store_quota_bytes", "Bytes on disk that the store may use.", prometheus.GaugeValue, func(s store.Stats) int64 { return s.Quota }},
	{"store_layers", "Layers in the store.", prometheus.GaugeValue, func(s store.Stats) int64 { return int64(s.Layers) }},
	{"store_evictions_total", "Diffs evicted to make room.", prometheus.CounterValue, func(s store.Stats) int64 { return s.Evicted }},
	{"store_evicted_bytes_total", "Bytes on disk freed by evictions.", prometheus.CounterValue, func(s store.Stats) int64 { return s.EvictedBytes }},
	{"store_deduplicated_bytes_total", "Bytes of ingested chunks that were stored already.", prometheus.CounterValue, func(s store.Stats) int64 { return s.Deduplicated }},
	{"store_put_bytes_total", "Bytes of ingested chunks that were new, before compression.", prometheus.CounterValue, func(s store.Stats) int64 { return s.PutBytes }},
	{"store_damaged_total", "Chunks and indexes found damaged on disk.", prometheus.CounterValue, func(s store.Stats) int64 { return s.Damaged }},
}

func newStoreCollector(stats func() store.Stats) *storeCollector {
	c := &storeCollector{stats: stats}
	for _, m := range storeMetrics {
		c.descs = append(c.descs, prometheus.NewDesc(namespace+"_"+m.name, m.help, nil, nil))
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *storeCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *storeCollector) Collect(ch chan<- prometheus.Metric) {
	st := c.stats()
	for i, m := range storeMetrics {
		ch <- prometheus.MustNewConstMetric(c.descs[i], m.kind, float64(m.value(st)))
	}
}
