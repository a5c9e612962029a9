package fusefs

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev/mount"
)

// benchSize is the length of the file that is read, in bytes.
const benchSize = 512 << 20

// BenchmarkSequential and BenchmarkRandom4K compare an image over FUSE, with all
// its data local, with the same image mounted from the file, with both through loop
// devices, and with the file itself. unsettled: the data is local and not on stable
// storage. cold: nothing is in the page cache; warm: the file is, but nothing of
// the image. cpu-µs is the processor time of this process (reader and server)
// for each operation; the machine's noise is not in it.
func BenchmarkSequential(b *testing.B) {
	buf := make([]byte, 1<<20)
	benchmark(b, func(f rawFile) int64 {
		for off := int64(0); off < benchSize; off += int64(len(buf)) {
			if _, err := f.ReadAt(buf, off); err != nil {
				b.Fatal(err)
			}
		}
		return benchSize
	})
}

// BenchmarkRandom4K reads 4096 pages in an order that read-ahead does not see.
func BenchmarkRandom4K(b *testing.B) {
	buf := make([]byte, pageSize)
	benchmark(b, func(f rawFile) int64 {
		if err := unix.Fadvise(int(f), 0, 0, unix.FADV_RANDOM); err != nil {
			b.Fatal(err)
		}
		const reads, pages = 4096, benchSize / pageSize
		for i := range int64(reads) {
			if _, err := f.ReadAt(buf, i*8191%pages*pageSize); err != nil {
				b.Fatal(err)
			}
		}
		return reads * pageSize
	})
}

// BenchmarkMissing has many readers read pages at once that are missing and come after
// 5 ms, by the two ways to mount an image. A loop device takes 128 reads at a time.
func BenchmarkMissing(b *testing.B) {
	const pages = 2048
	f := &memFile{data: make([]byte, pages*64<<10)}
	f.await = func(ctx context.Context, _ int64) error {
		select {
		case <-time.After(5 * time.Millisecond):
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	files := &memFiles{}
	files.put(idA, f)
	s := start(b, files, Options{})
	for _, readers := range []int{1, 16, 64, 512} {
		for _, c := range []struct {
			name string
			o    mount.Options
		}{{"file", mount.Options{}}, {"loop", mount.Options{Loop: true}}} {
			b.Run(fmt.Sprintf("%s/readers=%d", c.name, readers), func(b *testing.B) {
				path := filepath.Join(image(b, f.Size(), s.path(idA), c.o), "file")
				for range b.N {
					b.StopTimer()
					dropCaches(b)
					b.StartTimer()
					var wg sync.WaitGroup
					for r := range readers {
						wg.Go(func() {
							fd := openRaw(b, path)
							if err := unix.Fadvise(int(fd), 0, 0, unix.FADV_RANDOM); err != nil {
								b.Error(err)
							}
							buf := make([]byte, pageSize)
							for i := r; i < min(pages, 128*readers); i += readers {
								if _, err := fd.ReadAt(buf, int64(i)*64<<10); err != nil {
									b.Error(err)
								}
							}
						})
					}
					wg.Wait()
				}
			})
		}
	}
}

func benchmark(b *testing.B, read func(rawFile) int64) {
	needRoot(b)
	f := onDisk(b, 1, benchSize)
	files := &memFiles{}
	files.put(idA, f)
	unsettled := *f
	unsettled.unsettled = true
	files.put(idB, &unsettled)
	s := start(b, files, Options{})
	for _, c := range []struct {
		name string
		path string
	}{
		{"plain", f.local.Name()},
		{"erofs-file", filepath.Join(image(b, benchSize, f.local.Name(), mount.Options{}), "file")},
		{"erofs-fuse", filepath.Join(image(b, benchSize, s.path(idA), mount.Options{}), "file")},
		{"erofs-fuse-unsettled", filepath.Join(image(b, benchSize, s.path(idB), mount.Options{}), "file")},
		{"loop-file", filepath.Join(image(b, benchSize, f.local.Name(), mount.Options{Loop: true}), "file")},
		{"loop-fuse", filepath.Join(image(b, benchSize, s.path(idA), mount.Options{Loop: true}), "file")},
	} {
		for _, warm := range []bool{false, true} {
			name := c.name + "/cold"
			if warm {
				name = c.name + "/warm"
			}
			b.Run(name, func(b *testing.B) {
				var cpu, bytes int64
				for range b.N {
					b.StopTimer()
					dropCaches(b)
					if warm {
						if _, err := os.ReadFile(f.local.Name()); err != nil {
							b.Fatal(err)
						}
					}
					fd := openRaw(b, c.path)
					before := cpuTime(b)
					b.StartTimer()
					bytes = read(fd)
					b.StopTimer()
					cpu += cpuTime(b) - before
				}
				b.SetBytes(bytes)
				b.ReportMetric(float64(cpu)/float64(b.N), "cpu-µs/op")
			})
		}
	}
}

func dropCaches(b *testing.B) {
	b.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		b.Skip("cannot drop the page cache: ", err)
	}
}

// cpuTime is what this process has used, in microseconds.
func cpuTime(b *testing.B) int64 {
	b.Helper()
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return (r.Utime.Nano() + r.Stime.Nano()) / 1000
}
