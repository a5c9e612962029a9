package cache

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
	"github.com/shoalfs/shoal/blockdev/cache/internal/table"
)

func BenchmarkReadPresent(b *testing.B) {
	for _, n := range []int{4 << 10, 1 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			r := newRig(b, 64<<20, nil)
			r.prefetch()
			// Not complete, so that every read looks at the bits.
			r.d.complete.Store(false)
			p := make([]byte, n)
			rng := rand.New(rand.NewPCG(1, 1))
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.d.ReadAt(context.Background(), p, rng.Int64N(64<<20-int64(n))); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkLocal(b *testing.B) {
	r := newRig(b, 64<<20, nil)
	r.prefetch()
	r.d.complete.Store(false)
	rng := rand.New(rand.NewPCG(1, 1))
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := r.d.Local(rng.Int64N(63<<20), 1<<20); !ok {
			b.Fatal("not present")
		}
	}
}

func BenchmarkDrop(b *testing.B) {
	r := newRig(b, 8<<20, nil)
	r.prefetch()
	b.ReportAllocs()
	for b.Loop() {
		r.d.Drop(3<<20, 1<<20)
	}
}

// forget makes every chunk missing again.
func (r *rig) forget() {
	for i := range r.d.tab.Len() {
		r.d.pres.Drop(i)
	}
	r.d.complete.Store(false)
}

func BenchmarkReadMissing(b *testing.B) {
	for _, n := range []int{4 << 10, 1 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			const size = 64 << 20
			r := newRig(b, size, func(c *Config) { c.ReadAhead = -1 })
			p := make([]byte, n)
			var off int64
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				// A stride that brings every read to chunks of its own.
				if off+int64(n) > size {
					off = 0
					b.StopTimer()
					r.forget()
					b.StartTimer()
				}
				if _, err := r.d.ReadAt(context.Background(), p, off); err != nil {
					b.Fatal(err)
				}
				off += max(int64(n), blockdev.MaxChunk)
			}
		})
	}
}

// BenchmarkPrefetch includes the SHA-256 of every chunk, the writes, and the sync
// to the disk at the end.
func BenchmarkPrefetch(b *testing.B) {
	dirs := map[string]string{"disk": "", "tmpfs": "/dev/shm"}
	for name, parent := range dirs {
		b.Run(name, func(b *testing.B) {
			r := newRig(b, 256<<20, func(c *Config) {
				if parent != "" {
					dir, err := os.MkdirTemp(parent, "shoal-cache-bench")
					if err != nil {
						b.Skip("no ", parent)
					}
					b.Cleanup(func() { _ = os.RemoveAll(dir) })
					c.Root = dir
				}
			})
			b.SetBytes(256 << 20)
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				r.forget()
				b.StartTimer()
				r.prefetch()
			}
		})
	}
}

// BenchmarkLookup asks for a chunk that none of 100 diffs of 5,000 chunks has:
// what a fresh image costs on a node that has many others.
func BenchmarkLookup(b *testing.B) {
	c := &shared{}
	var list []*local
	for k := range 100 {
		ix := new(blockdev.Index)
		for i := range 5000 {
			n := uint32(blockdev.AvgChunk)
			ix.Chunks = append(ix.Chunks, blockdev.Chunk{Offset: ix.DiffSize, Length: n, Digest: blockdev.Sum([]byte(fmt.Sprint(k, i)))})
			ix.DiffSize += int64(n)
		}
		tab, err := table.New(ix)
		if err != nil {
			b.Fatal(err)
		}
		list = append(list, &local{tab: tab, pres: presence.New(blockdev.Digest{byte(k)}, tab.Len(), tab.Length)})
	}
	c.list.Store(&list)
	var digests []blockdev.Digest
	for i := range 4096 {
		digests = append(digests, blockdev.Sum([]byte(fmt.Sprint("unknown", i))))
	}
	i := 0
	for b.Loop() {
		if d, _ := c.lookup(&digests[i%len(digests)]); d != nil {
			b.Fatal("found")
		}
		i++
	}
}

// BenchmarkOpen opens a cache of 100 diffs of 1,000 chunks each.
func BenchmarkOpen(b *testing.B) {
	r := newRig(b, 1<<20, nil)
	for k := range 99 {
		ix := &blockdev.Index{DiffID: blockdev.Sum([]byte(fmt.Sprint("diff", k))), Meta: blockdevtest.Bytes(uint64(k), 200_000)}
		for i := range 1000 {
			n := uint32(blockdev.AvgChunk)
			ix.Chunks = append(ix.Chunks, blockdev.Chunk{Offset: ix.DiffSize, Length: n, Digest: blockdev.Sum([]byte(fmt.Sprint(k, i)))})
			ix.DiffSize += int64(n)
		}
		r.add(ix)
	}
	for b.Loop() {
		b.StopTimer()
		r.close()
		b.StartTimer()
		r.open()
		if len(r.Diffs()) != 100 {
			b.Fatal("diffs are missing")
		}
	}
}

func BenchmarkAdd(b *testing.B) {
	r := newRig(b, 1<<20, nil)
	enc := encode(b, r.ix)
	for b.Loop() {
		b.StopTimer()
		if err := r.Remove(context.Background(), r.ix.DiffID); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if _, err := r.Add(context.Background(), enc); err != nil {
			b.Fatal(err)
		}
	}
}
