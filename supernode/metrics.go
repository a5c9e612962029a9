package supernode

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/internal/metric"
	"github.com/shoalfs/shoal/supernode/internal/outcome"
	"github.com/shoalfs/shoal/supernode/layers"
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
	chunks        *prometheus.CounterVec
	chunkBytes    prometheus.Counter
	profiles      prometheus.Counter
}

const namespace = "shoal_supernode"

func newMetrics(reg prometheus.Registerer, stats func() store.Stats) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return metric.Counter(namespace+"_"+name, help)
	}
	m := &metrics{
		Set:           metric.Set{Registerer: reg},
		registryBytes: counter("registry_bytes_total", "Bytes of answers received from registries."),
		images:        outcome.Counter(namespace+"_image_requests_total", "Requests for the indexes of an image, by outcome."),
		imageSeconds:  metric.Seconds(namespace+"_image_request_seconds", "Time until the indexes of an image were sent."),
		relayed:       counter("relayed_images_total", "Answers that named other nodes instead of the indexes."),
		documents:     outcome.Counter(namespace+"_document_requests_total", "Requests for manifests and configs, by outcome."),
		chunks:        outcome.Counter(namespace+"_chunk_requests_total", "Requested chunks, by outcome."),
		chunkBytes:    counter("chunk_bytes_total", "Bytes of chunks that were sent, as stored."),
		profiles:      counter("startup_profiles_total", "Accepted reports of the chunks that a container read at its start, one for each layer."),
	}
	all := append([]prometheus.Collector{m.registryBytes, m.images, m.imageSeconds, m.relayed, m.documents, m.chunks, m.chunkBytes, m.profiles},
		storeCollectors(stats)...)
	return m, m.Register(all...)
}

// watch adds the gauges of what is limited.
func (m *metrics) watch(l *layers.Layers, download *pace.Pacer) error {
	return m.Register(
		metric.Uses(namespace+"_places", "Places for work: ingests of layers over 8 MiB and of small ones, layers that are verified (fetched again) or restored from nodes. "+
			"If used is above capacity, then registries without a layer under way got one more.", l.Places()),
		metric.Uses(namespace+"_bytes", "Bytes that layers under way may take of the spool, and bytes of layers that wait for registry.max_download (capacity: bytes a second).",
			map[string]func() blockdev.Use{
				"spool": l.Spool,
				"download": func() blockdev.Use {
					w := download.Waiting()
					return blockdev.Use{Waiting: w[0] + w[1] + w[2], Capacity: download.Rate()}
				},
			}),
	)
}

func (m *metrics) received(n int64) { m.registryBytes.Add(float64(n)) }

func (m *metrics) image(err error, d time.Duration) {
	m.images.WithLabelValues(outcome.Of(err)).Inc()
	if err == nil {
		m.imageSeconds.Observe(d.Seconds())
	}
}

func (m *metrics) document(err error) { m.documents.WithLabelValues(outcome.Of(err)).Inc() }

func (m *metrics) chunk(err error, n int) {
	m.chunks.WithLabelValues(outcome.Of(err)).Inc()
	m.chunkBytes.Add(float64(n))
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

// storeCollectors read the store's counters when somebody looks.
func storeCollectors(stats func() store.Stats) (all []prometheus.Collector) {
	for _, m := range storeMetrics {
		value := func() float64 { return float64(m.value(stats())) }
		if m.kind == prometheus.CounterValue {
			all = append(all, prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: namespace, Name: m.name, Help: m.help}, value))
		} else {
			all = append(all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: namespace, Name: m.name, Help: m.help}, value))
		}
	}
	return all
}
