// Package metrics is what a node counts beside its parts, which count for themselves.
package metrics

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/volume"
	"github.com/shoalfs/shoal/internal/metric"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// Metrics count before they are registered.
type Metrics struct {
	reads    *reads
	calls    *calls
	received prometheus.Counter
}

// New returns Metrics that are all zero.
func New() *Metrics {
	return &Metrics{reads: newReads(), calls: newCalls(), received: metric.Counter(
		"shoal_node_registry_bytes_total", "Bytes that this node has received from registries when it read layers itself.")}
}

// Received counts bytes that a registry has sent.
func (m *Metrics) Received(n int64) { m.received.Add(float64(n)) }

// Register registers all of it, and what is read off vols and c at each scrape.
func (m *Metrics) Register(reg prometheus.Registerer, vols *volume.Manager, c *images.Catalogue) error {
	set := metric.Set{Registerer: reg}
	return set.Register(append(collectors(vols, c), m.reads, m.calls.seconds, m.calls.longest, m.received)...)
}

// collectors are the metrics that are read off volumes and catalogue.
func collectors(vols *volume.Manager, c *images.Catalogue) []prometheus.Collector {
	counter := func(name, help string, labels prometheus.Labels, value func(cache.Stats) float64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help, ConstLabels: labels},
			func() float64 { return value(vols.Counters()) })
	}
	usage := func(name, help string, value func(cache.Stats) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return value(vols.Counters()) })
	}
	waiting := func(age time.Duration) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "shoal_node_reads_in_flight", Help: "Reads that wait for bytes now, and have waited for at least age.",
			ConstLabels: prometheus.Labels{"age": fmt.Sprintf("%.0fs", age.Seconds())},
		}, func() float64 { return float64(vols.Waiting(age)[0]) })
	}
	gauge := func(name, help string, value func(volume.Stat) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			var sum float64
			for _, s := range vols.Stats() {
				sum += value(s)
			}
			return sum
		})
	}
	lazy := func(users string, counts func(lazy bool, users int) bool) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "shoal_node_lazy_mounts", Help: "Layers that are mounted through FUSE, by whether containers use them.",
			ConstLabels: prometheus.Labels{"users": users},
		}, func() float64 {
			read, err := vols.LazyUsers()
			if err != nil {
				return math.NaN()
			}
			var sum float64
			for _, s := range vols.Stats() {
				sum += b2f(counts(s.Dir != "" && s.Lazy, read[s.ID]))
			}
			return sum
		})
	}
	const proofs, proofsHelp = "shoal_node_proofs_total", "Complete layers that were hashed and indexed again, by outcome."
	const fetched, fetchedHelp = "shoal_node_fetched_bytes_total", "Uncompressed bytes that were fetched, by priority. Read-ahead counts as demand; proof is the header stream, which only the proof reads."
	all := []prometheus.Collector{
		counter(fetched, fetchedHelp, prometheus.Labels{"priority": "demand"}, func(s cache.Stats) float64 { return float64(s.DemandBytes) }),
		counter(fetched, fetchedHelp, prometheus.Labels{"priority": "startup"}, func(s cache.Stats) float64 { return float64(s.StartupBytes) }),
		counter(fetched, fetchedHelp, prometheus.Labels{"priority": "prefetch"}, func(s cache.Stats) float64 { return float64(s.PrefetchBytes) }),
		counter(fetched, fetchedHelp, prometheus.Labels{"priority": "proof"}, func(s cache.Stats) float64 { return float64(s.HeaderBytes) }),
		counter("shoal_node_copied_bytes_total", "Bytes of chunks that were copied from another layer on this disk.", nil, func(s cache.Stats) float64 { return float64(s.CopiedBytes) }),
		counter("shoal_node_demand_waits_total", "Reads that had to wait for bytes.", nil, func(s cache.Stats) float64 { return float64(s.Missed) }),
		counter("shoal_node_demand_wait_seconds_total", "Total time of the reads that had to wait for bytes.", nil, func(s cache.Stats) float64 { return s.Waited.Seconds() }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "shoal_node_demand_failures_total", Help: "Reads that failed because bytes did not come."},
			func() float64 { return float64(vols.FailedReads()) }),
		counter("shoal_node_corrupt_chunks_total", "Chunks that came with wrong bytes and were not used.", nil, func(s cache.Stats) float64 { return float64(s.CorruptChunks) }),
		counter("shoal_node_damaged_chunks_total", "Chunks that were found wrong or unreadable on this disk.", nil, func(s cache.Stats) float64 { return float64(s.DamagedChunks) }),
		counter(proofs, proofsHelp, prometheus.Labels{"outcome": "proven"}, func(s cache.Stats) float64 { return float64(s.Proven) }),
		counter(proofs, proofsHelp, prometheus.Labels{"outcome": "quarantined"}, func(s cache.Stats) float64 { return float64(s.Quarantined) }),
		waiting(0), waiting(time.Second), waiting(10 * time.Second), waiting(time.Minute),
		counter("shoal_node_not_kept_bytes_total", "Bytes that came for reads and were not stored, because there was not enough room.", nil, func(s cache.Stats) float64 { return float64(s.NotKept) }),
		usage("shoal_node_cache_bytes", "Bytes on disk that layers take.", func(s cache.Stats) float64 { return float64(s.Used) }),
		usage("shoal_node_cache_quota_bytes", "Bytes on disk that layers may take; 0: the whole disk.", func(s cache.Stats) float64 { return float64(s.Quota) }),
		gauge("shoal_node_diffs", "Layers that this node has an index of.", func(volume.Stat) float64 { return 1 }),
		gauge("shoal_node_diff_bytes", "Bytes of the layers that this node has an index of.", func(s volume.Stat) float64 { return float64(s.Total) }),
		gauge("shoal_node_local_bytes", "Bytes of layers that are on this node's disk.", func(s volume.Stat) float64 { return float64(s.Local) }),
		gauge("shoal_node_proven_diffs", "Layers that are proven to be what the image config says.", func(s volume.Stat) float64 { return b2f(s.Proof == cache.Proven) }),
		gauge("shoal_node_quarantined_diffs", "Layers that do not match their index; images with such a layer are refused.", func(s volume.Stat) float64 { return b2f(s.Proof == cache.Quarantined) }),
		lazy("containers", func(_ bool, users int) bool { return users > 0 }),
		lazy("none", func(lazy bool, users int) bool { return lazy && users == 0 }),
	}
	use := func(of func(volume.Uses) blockdev.Use) func() blockdev.Use {
		return func() blockdev.Use { return of(vols.Uses()) }
	}
	all = append(all,
		metric.Uses("shoal_node_places", "Limited work: reads that wait for bytes, readers that fetch bytes for them, layers that are prefetched, proven and scrubbed.",
			map[string]func() blockdev.Use{
				"reads":      use(func(u volume.Uses) blockdev.Use { return u.Reads }),
				"readers":    use(func(u volume.Uses) blockdev.Use { return u.Readers }),
				"prefetches": use(func(u volume.Uses) blockdev.Use { return u.Prefetches }),
				"proofs":     use(func(u volume.Uses) blockdev.Use { return u.Proofs }),
				"scrubs":     use(func(u volume.Uses) blockdev.Use { return u.Scrubs }),
			}),
		metric.Uses("shoal_node_bytes", "Limited bytes, and how many requests wait for them: in flight for reads (demand), held because the disk takes no writes (unwritten), indexes of pulls (indexes).",
			map[string]func() blockdev.Use{
				"demand":    use(func(u volume.Uses) blockdev.Use { return u.DemandBytes }),
				"unwritten": use(func(u volume.Uses) blockdev.Use { return u.HeldBytes }),
				"indexes":   func() blockdev.Use { return c.IndexRoom() },
			}))
	for _, complete := range []bool{true, false} {
		state := map[bool]string{true: "complete", false: "incomplete"}[complete]
		all = append(all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "shoal_node_images", Help: "Lazy and kept images, by whether all of their bytes are on this node.", ConstLabels: prometheus.Labels{"state": state},
		}, func() float64 { return countImages(vols, c, complete) }))
	}
	for _, cause := range images.Causes {
		all = append(all, prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "shoal_node_not_lazy_total", Help: "Pulls of images that are not lazy, by cause; shoal status names the images.",
			ConstLabels: prometheus.Labels{"cause": string(cause)},
		}, func() float64 { return float64(c.Refused(cause)) }))
	}
	return all
}

// countImages counts those of which everything is here, or those of which it is not.
func countImages(vols *volume.Manager, c *images.Catalogue, complete bool) float64 {
	list, err := c.Images(context.Background())
	if err != nil {
		return math.NaN()
	}
	n := 0
	for _, im := range list {
		missing := slices.ContainsFunc(im.Layers, func(l images.Layer) bool {
			s, ok := vols.Stat(l.DiffID)
			return !ok || !s.Complete
		})
		if missing != complete {
			n++
		}
	}
	return float64(n)
}

func b2f(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
