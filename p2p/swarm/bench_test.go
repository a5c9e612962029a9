package swarm

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// BenchmarkPeerHit is a demand read of 64 KiB that another node has on its disk:
// route, wire, its disk and both digests, without this node's disk.
func BenchmarkPeerHit(b *testing.B) {
	w := newWorld(b, 32<<20)
	one, two := w.node(options{}), w.node(options{})
	w.connect()
	for i := range w.ix.Chunks {
		w.read(one, i)
	}
	took := make([]time.Duration, 0, b.N)
	for i := 0; b.Loop(); i++ {
		c := w.ix.Chunks[i%len(w.ix.Chunks)]
		begin := time.Now()
		err := two.swarm.Fetch(b.Context(), blockdev.Request{Diff: w.ix.DiffID, Priority: blockdev.Demand, Chunks: []blockdev.Chunk{c}}, func(_ int, data []byte) error {
			if blockdev.Sum(data) != c.Digest {
				return fmt.Errorf("wrong bytes: %w", blockdev.ErrCorrupt)
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(begin))
	}
	slices.Sort(took)
	for _, q := range []struct {
		name string
		at   int
	}{{"p50", 500}, {"p99", 990}, {"p99.9", 999}} {
		b.ReportMetric(float64(took[len(took)*q.at/1000].Microseconds()), q.name+"-us")
	}
	b.ReportMetric(two.metric(b, "shoal_node_received_bytes_total", "peer")/float64(len(took))/1024, "peer-KiB/op")
}
