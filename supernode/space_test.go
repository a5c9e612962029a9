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
	"github.com/shoalfs/shoal/supernode/registry/registrytest"
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
	s := start(t, at(dir), func(c *Config) { c.Quota, c.Lease = quota, time.Millisecond })
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
				_, err := s.OpenImage(t.Context(), request(f.Target, fmt.Sprintf("app%d:v1", i), nobody))
				if err == nil {
					return
				}
				// What is being ingested cannot be evicted; there is room when it is through.
				if !errors.Is(err, blockdev.ErrNoSpace) && !errors.Is(err, blockdev.ErrUnavailable) || t.Context().Err() != nil {
					t.Error(err)
					return
				}
				s.failed.forget()
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

// forget makes the next attempt happen at once.
func (f *failures) forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.errs)
}
