package supernode

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// onDisk is what a directory takes of the disk, as the file system counts.
func onDisk(t *testing.T, dir string) (n int64) {
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // just removed
		}
		n += st.Blocks * 512
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	return n
}

// TestQuotaHoldsAllTogether: many images at once, several times what the quota
// allows. Chunks, indexes, spool and manifests stay within it all the time, and
// every image is had, if not at once.
func TestQuotaHoldsAllTogether(t *testing.T) {
	const quota = 48 << 20
	dir := filepath.Join(t.TempDir(), "data")
	clock := newClock()
	s := start(t, at(dir), clock.use, func(c *Config) { c.Quota, c.Lease = quota, time.Millisecond })
	f := registrytest.NewFake(t)
	const images = 16
	for i := range images {
		f.Push(t, fmt.Sprintf("app%d", i), "v1", registrytest.GzipLayer(t, "f", 6<<20, uint64(i)))
	}
	var most atomic.Int64
	stop := make(chan struct{})
	var watch, work sync.WaitGroup
	watch.Go(func() {
		for {
			most.Store(max(most.Load(), onDisk(t, dir)))
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	})
	for i := range images {
		work.Go(func() {
			for {
				_, err := s.FetchIndexes(t.Context(), request(f.Target, fmt.Sprintf("app%d:v1", i), nobody))
				if err == nil {
					return
				}
				// What is being ingested cannot be evicted; there is room when it is through.
				if !errors.Is(err, blockdev.ErrNoSpace) && !errors.Is(err, blockdev.ErrUnavailable) || t.Context().Err() != nil {
					t.Error(err)
					return
				}
				clock.pass(time.Minute)
			}
		})
	}
	work.Wait()
	close(stop)
	watch.Wait()
	if n := most.Load(); n > quota || n < quota/2 {
		t.Errorf("%d bytes on disk at most, the quota is %d", n, quota)
	}
	if s.store.Stats().Evicted == 0 {
		t.Error("nothing evicted")
	}
	t.Logf("most on disk: %.1f MiB of %d", float64(most.Load())/(1<<20), quota>>20)
}

// What was asked for within half an hour may be more than the quota: then what was
// asked for longest ago goes, and the new image comes.
func TestLeasesYield(t *testing.T) {
	f := registrytest.NewFake(t)
	s := start(t, func(c *Config) { c.Quota, c.Lease = 48<<20, time.Hour })
	const images = 12
	for i := range images {
		f.Push(t, fmt.Sprintf("app%d", i), "v1", registrytest.GzipLayer(t, "f", 6<<20, uint64(i)), registrytest.GzipLayer(t, "g", 1<<20, uint64(100+i)))
		if _, err := s.FetchIndexes(t.Context(), request(f.Target, fmt.Sprintf("app%d:v1", i), nobody)); err != nil {
			t.Fatalf("image %d, with leases on all before it: %v", i, err)
		}
	}
	if s.store.Stats().Evicted == 0 {
		t.Error("nothing was evicted: the images are too small for this test")
	}
	stored := s.stock.Images()
	if len(stored) == 0 || stored[0].Ref != f.Host+"/app11:v1" {
		t.Errorf("the newest image is not stored: %v", stored)
	}
	// An image that is larger than the store does not go round and round.
	var layers []registrytest.Layer
	for i := range images {
		layers = append(layers, registrytest.GzipLayer(t, "f", 6<<20, uint64(1000+i)))
	}
	f.Push(t, "huge", "v1", layers...)
	if _, err := s.FetchIndexes(t.Context(), request(f.Target, "huge:v1", nobody)); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Errorf("an image that is larger than the store: %v", err)
	}
}
