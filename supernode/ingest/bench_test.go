package ingest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/klauspost/compress/gzip"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/supernode/store"
)

// ociImage reads an image of the OCI layout at $SHOAL_BENCH_OCI (default
// ~/.cache/shoal/images/oci, where `make images` builds them). Its name is
// $SHOAL_BENCH_IMAGE, torch.v1 if that is not set.
func ociImage(b *testing.B) []Layer {
	b.Helper()
	dir := os.Getenv("SHOAL_BENCH_OCI")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			b.Skip(err)
		}
		dir = filepath.Join(home, ".cache", "shoal", "images", "oci")
	}
	name := os.Getenv("SHOAL_BENCH_IMAGE")
	if name == "" {
		name = "torch.v1"
	}
	type descriptor struct {
		MediaType   string
		Digest      blockdev.Digest
		Size        int64
		Annotations map[string]string
	}
	read := func(path string, v any) {
		data, err := os.ReadFile(filepath.Join(dir, path))
		if err == nil {
			err = json.Unmarshal(data, v)
		}
		if err != nil {
			b.Skipf("no OCI layout with images: %v", err)
		}
	}
	blob := func(d blockdev.Digest) string { return filepath.Join("blobs", "sha256", d.Hex()) }
	var ix struct{ Manifests []descriptor }
	read("index.json", &ix)
	at := slices.IndexFunc(ix.Manifests, func(d descriptor) bool {
		return d.Annotations["org.opencontainers.image.ref.name"] == name
	})
	if at < 0 {
		b.Skipf("no image %s in %s", name, dir)
	}
	var m struct {
		Config descriptor
		Layers []descriptor
	}
	read(blob(ix.Manifests[at].Digest), &m)
	var config struct {
		RootFS struct {
			DiffIDs []blockdev.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	read(blob(m.Config.Digest), &config)
	var layers []Layer
	for i, l := range m.Layers {
		path := filepath.Join(dir, blob(l.Digest))
		layers = append(layers, Layer{
			Ref: name, Digest: l.Digest, Size: l.Size, MediaType: l.MediaType, DiffID: config.RootFS.DiffIDs[i],
			Origin: "bench", Open: func(_ context.Context, off int64) (io.ReadCloser, error) {
				f, err := os.Open(path)
				if err == nil {
					_, err = f.Seek(off, io.SeekStart)
				}
				return f, err
			},
		})
	}
	return layers
}

// usage returns the CPU seconds used so far and, since resetPeak, the peak RSS
// in MiB.
func usage(b *testing.B) (cpu, rss float64) {
	b.Helper()
	var ru syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
		b.Fatal(err)
	}
	cpu = float64(ru.Utime.Sec+ru.Stime.Sec) + float64(ru.Utime.Usec+ru.Stime.Usec)/1e6
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			var kib float64
			if _, err := fmt.Sscan(v, &kib); err != nil {
				b.Fatal(err)
			}
			rss = kib / 1024
		}
	}
	return cpu, rss
}

func resetPeak() {
	runtime.GC()
	os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) //nolint:errcheck // only the figure gets worse
}

// BenchmarkImage ingests all layers of a real image, as many at a time as the
// default says, from files.
func BenchmarkImage(b *testing.B) {
	layers := ociImage(b)
	benchIngest(b, layers)
}

// BenchmarkLargestLayer ingests the image's largest layer alone.
func BenchmarkLargestLayer(b *testing.B) {
	layers := ociImage(b)
	l := slices.MaxFunc(layers, func(x, y Layer) int { return int(x.Size - y.Size) })
	benchIngest(b, []Layer{l})
}

func benchIngest(b *testing.B, layers []Layer) {
	for b.Loop() {
		dir := b.TempDir()
		st, err := store.Open(store.Config{Dir: filepath.Join(dir, "store")})
		if err != nil {
			b.Fatal(err)
		}
		in, err := New(Config{Store: st, SpoolDir: filepath.Join(dir, "spool")})
		if err != nil {
			b.Fatal(err)
		}
		resetPeak()
		cpu, _ := usage(b)
		var wg sync.WaitGroup
		for _, l := range layers {
			wg.Go(func() {
				if _, err := in.Layer(b.Context(), l, nil); err != nil {
					b.Error(err)
				}
			})
		}
		wg.Wait()
		after, rss := usage(b)
		b.SetBytes(in.Stats().Unpacked)
		b.ReportMetric(after-cpu, "cpu-s/op")
		b.ReportMetric(rss, "peak-MiB")
		if err := errors.Join(in.Close(), st.Close(), os.RemoveAll(dir)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkGunzip is what no ingest of the image's largest layer can be faster
// than on one core.
func BenchmarkGunzip(b *testing.B) {
	layers := ociImage(b)
	l := slices.MaxFunc(layers, func(x, y Layer) int { return int(x.Size - y.Size) })
	for b.Loop() {
		cpu, _ := usage(b)
		rc, err := l.Open(b.Context(), 0)
		if err != nil {
			b.Fatal(err)
		}
		z, err := gzip.NewReader(rc)
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.Copy(io.Discard, z)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(n)
		after, _ := usage(b)
		b.ReportMetric(after-cpu, "cpu-s/op")
		rc.Close()
	}
}
