package cache

import (
	"context"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
)

// cachedBytes is what the page cache holds of a file.
func cachedBytes(t testing.TB, f *os.File) int64 {
	t.Helper()
	var span struct{ off, len uint64 }
	var stat struct{ cached, dirty, writeback, evicted, recently uint64 }
	var errno unix.Errno
	err := disk.Control(f, func(fd int) error {
		_, _, errno = unix.Syscall6(unix.SYS_CACHESTAT, uintptr(fd), uintptr(unsafe.Pointer(&span)), uintptr(unsafe.Pointer(&stat)), 0, 0, 0)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if errno != 0 {
		t.Skipf("this kernel has no cachestat (Linux 6.5): %v", errno)
	}
	return int64(stat.cached) * int64(os.Getpagesize())
}

// onDisk skips where pages cannot be dropped, as on a tmpfs.
func onDisk(t testing.TB, dir string) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	if st.Type == unix.TMPFS_MAGIC {
		t.Skip("a tmpfs is its own page cache; set TMPDIR to a disk")
	}
}

// TestPageCacheStaysSmall: prefetch does not leave the diff in the page cache,
// and what demand reads bring there goes with the next sync or Drop.
func TestPageCacheStaysSmall(t *testing.T) {
	const size = 48 << 20
	r := newRig(t, size, func(c *Config) { c.SyncBytes = 1 << 20 })
	onDisk(t, r.cfg.Root)
	var mu sync.Mutex
	var most int64
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		mu.Lock()
		most = max(most, cachedBytes(t, r.d.data))
		mu.Unlock()
		return r.mem.Fetch(ctx, req, deliver)
	})
	r.prefetch()
	t.Logf("prefetch of %d MiB: at most %d KiB cached on the way, %d KiB at the end", size>>20, most>>10, cachedBytes(t, r.d.data)>>10)
	if most > 12<<20 {
		t.Errorf("%d bytes of the data file were cached during prefetch", most)
	}
	if n := cachedBytes(t, r.d.data); n > 1<<20 {
		t.Errorf("%d bytes of the data file are cached after prefetch", n)
	}
	r.checkRead(0, size)
	before := cachedBytes(t, r.d.data)
	for off := int64(0); off < size; off += 1 << 20 {
		r.d.Drop(off, 1<<20)
	}
	if n := cachedBytes(t, r.d.data); before < size/2 || n > 2<<20 {
		t.Errorf("cached after reads %d, after Drop %d", before, n)
	}
}

// TestDropLeavesUnsynced: Drop does not force what was just written to the disk;
// the sync that follows drops it.
func TestDropLeavesUnsynced(t *testing.T) {
	r := newRig(t, 12<<20, nil)
	onDisk(t, r.cfg.Root)
	r.checkRead(0, 8<<20)
	r.quiet()
	r.d.Drop(0, 8<<20)
	if n := cachedBytes(t, r.d.data); n < 4<<20 {
		t.Errorf("Drop wrote out what was not synced: %d bytes cached", n)
	}
	if err := r.d.sync(context.Background()); err != nil {
		t.Fatal(err)
	}
	if n := cachedBytes(t, r.d.data); n > 2<<20 {
		t.Errorf("%d bytes cached after a sync", n)
	}
}

// TestSyncInBackground: what demand reads wrote is synced without anybody asking.
func TestSyncInBackground(t *testing.T) {
	r := newRig(t, 3<<20, func(c *Config) { c.SyncInterval = time.Millisecond })
	r.checkRead(0, 1<<20)
	r.quiet()
	r.eventually("everything is synced", func() bool {
		_, _, unsynced := r.d.pres.Counts()
		return unsynced == 0
	})
}
