package exchange

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

// benchPair is a server with 64 MiB of 64 KiB chunks, and a client of it.
func benchPair(b *testing.B, compress bool, o Options) (*Client, []blockdev.Chunk) {
	b.Helper()
	data := make([][]byte, 1024)
	for i := range data {
		if data[i] = blockdevtest.Bytes(uint64(i), blockdev.AvgChunk); compress {
			data[i] = text(uint64(i), blockdev.AvgChunk)
		}
	}
	st, chunks := newStore(b, compress, data...)
	h := newHost(b, nil, loopback)
	newServer(b, h, ServerConfig{Chunks: st})
	c := newClient(b, h, o)
	if err := c.Fetch(b.Context(), request(blockdev.Demand, chunks[:1]), discard); err != nil {
		b.Fatal(err)
	}
	return c, chunks
}

func report(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-us")
	b.ReportMetric(float64(took[len(took)*999/1000].Nanoseconds())/1e3, "p99.9-us")
}

// cpu is the processor time that this process has used.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkDemand is one chunk of 64 KiB at a time, as a blocked read sees it.
func BenchmarkDemand(b *testing.B) {
	for _, compress := range []bool{false, true} {
		b.Run(fmt.Sprintf("zstd=%v", compress), func(b *testing.B) {
			c, chunks := benchPair(b, compress, Options{})
			took := make([]time.Duration, 0, 1<<16)
			b.SetBytes(blockdev.AvgChunk)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				i %= len(chunks)
				start := time.Now()
				if err := c.Fetch(b.Context(), request(blockdev.Demand, chunks[i:i+1]), discard); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(start))
			}
			report(b, took)
		})
	}
}

// BenchmarkPrefetch is requests of the largest size. sha: with the digest check
// that a real Deliver does.
func BenchmarkPrefetch(b *testing.B) {
	for _, bench := range []struct {
		name     string
		compress bool
		streams  int
		sha      bool
	}{
		{"raw/streams=1", false, 1, false},
		{"raw/streams=2", false, 2, false},
		{"raw/streams=4", false, 4, false},
		{"raw/streams=2/sha", false, 2, true},
		{"zstd/streams=1", true, 1, false},
		{"zstd/streams=2/sha", true, 2, true},
	} {
		b.Run(bench.name, func(b *testing.B) {
			c, chunks := benchPair(b, bench.compress, Options{})
			deliver := discard
			if bench.sha {
				deliver = func(i int, data []byte) error {
					if blockdev.Sum(data) != chunks[i].Digest {
						return blockdev.ErrCorrupt
					}
					return nil
				}
			}
			b.SetBytes(int64(len(chunks)) * blockdev.AvgChunk)
			b.ReportAllocs()
			before := cpu(b)
			for b.Loop() {
				var wg sync.WaitGroup
				for range bench.streams {
					part := chunks[:len(chunks)/bench.streams]
					wg.Go(func() {
						if err := c.Fetch(b.Context(), request(blockdev.Prefetch, part), deliver); err != nil {
							b.Error(err)
						}
					})
				}
				wg.Wait()
			}
			// On a busy machine this says more than MB/s: the processor time of
			// both ends.
			b.ReportMetric((cpu(b)-before).Seconds()*1e3/(float64(b.N*len(chunks)*blockdev.AvgChunk)/1e9), "cpu-ms/GB")
		})
	}
}

// BenchmarkDemandUnderPrefetch is BenchmarkDemand while as much is prefetched on
// the same connection as goes through.
func BenchmarkDemandUnderPrefetch(b *testing.B) {
	c, chunks := benchPair(b, false, Options{})
	ctx, cancel := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	var moved atomic.Int64
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				_ = c.Fetch(ctx, request(blockdev.Prefetch, chunks), func(_ int, data []byte) error {
					moved.Add(int64(len(data)))
					return nil
				})
			}
		})
	}
	var took []time.Duration
	begin := time.Now()
	for i := 0; b.Loop(); i++ {
		i %= len(chunks)
		start := time.Now()
		if err := c.Fetch(ctx, request(blockdev.Demand, chunks[i:i+1]), discard); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	b.ReportMetric(float64(moved.Load())/1e6/time.Since(begin).Seconds(), "prefetch-MB/s")
	cancel()
	wg.Wait()
	report(b, took)
}
