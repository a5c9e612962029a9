package layer

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// benchDiff is the layer that SHOAL_BENCH_TAR names, or one made of files of
// many sizes.
func benchDiff(b *testing.B) []byte {
	b.Helper()
	if name := os.Getenv("SHOAL_BENCH_TAR"); name != "" {
		diff, err := os.ReadFile(name)
		if err != nil {
			b.Fatal(err)
		}
		return diff
	}
	var entries []entry
	text := string(randomBytes(1, 1<<20))
	for i := range 6000 {
		entries = append(entries, file(fmt.Sprintf("usr/lib/d%d/f%d", i/50, i), text[i:i+(i*i)%(20<<10)]))
	}
	for i := range 60 {
		entries = append(entries, file(fmt.Sprintf("usr/bin/b%d", i), text[i:]))
	}
	return makeTar(entries...)
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkBuild stores nothing, so it is DiffID, scan, chunks and metadata.
func BenchmarkBuild(b *testing.B) {
	diff := benchDiff(b)
	put := func(context.Context, blockdev.Digest, []byte) error { return nil }
	b.SetBytes(int64(len(diff)))
	b.ReportAllocs()
	start := cpuTime()
	for b.Loop() {
		if _, err := Build(b.Context(), bytes.NewReader(diff), put, Options{}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(cpuTime()-start)/float64(b.N)/float64(len(diff)), "cpu-s/GB")
}

func BenchmarkRestore(b *testing.B) {
	diff := benchDiff(b)
	m := newMemory()
	ix, err := Build(b.Context(), bytes.NewReader(diff), m.put, Options{})
	if err != nil {
		b.Fatal(err)
	}
	masked, err := m.masked(ix)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(diff)))
	for b.Loop() {
		if err := Restore(b.Context(), ix, bytes.NewReader(masked), m.piece, io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkEntries says what an empty entry costs in memory before the metadata
// is written.
func BenchmarkEntries(b *testing.B) {
	const n = 100_000
	var buf bytes.Buffer
	for i := range n {
		e := file(fmt.Sprintf("some/directory/of/%d/file-%d", i/100, i), "")
		e.write(&buf)
	}
	buf.Write(make([]byte, 1024))
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		tr, err := scanTree(buf.Bytes(), Options{})
		if err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(tr)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/entry")
	}
}
