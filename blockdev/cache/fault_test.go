package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
)

// TestSourceFaults: whatever the source does, a read gives right bytes or an
// error that says what, where and why, and nothing wrong is ever called present.
func TestSourceFaults(t *testing.T) {
	wrong := func(_ context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		var first error
		for i, c := range req.Chunks {
			if err := deliver(i, make([]byte, c.Length)); err != nil && first == nil {
				first = err
			}
		}
		return first
	}
	faults := map[string]struct {
		fetch blockdevtest.SourceFunc
		want  error
	}{
		"wrong bytes": {wrong, blockdev.ErrCorrupt},
		"wrong bytes, no error": {func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
			_ = wrong(ctx, req, deliver)
			return nil
		}, blockdev.ErrUnavailable},
		"short": {func(_ context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
			return deliver(0, make([]byte, 10))
		}, blockdev.ErrCorrupt},
		"no such number": {func(_ context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
			if deliver(-1, nil) == nil || deliver(len(req.Chunks), nil) == nil {
				return nil
			}
			return blockdev.ErrUnavailable
		}, blockdev.ErrUnavailable},
		"nothing": {func(context.Context, blockdev.Request, blockdev.Deliver) error { return nil }, blockdev.ErrUnavailable},
		"unavailable": {func(context.Context, blockdev.Request, blockdev.Deliver) error {
			return fmt.Errorf("supernode is on fire: %w", blockdev.ErrUnavailable)
		}, blockdev.ErrUnavailable},
		"not found": {func(context.Context, blockdev.Request, blockdev.Deliver) error {
			return fmt.Errorf("chunk: %w", blockdev.ErrNotFound)
		}, blockdev.ErrNotFound},
		"never": {func(ctx context.Context, _ blockdev.Request, _ blockdev.Deliver) error {
			<-ctx.Done()
			return ctx.Err()
		}, blockdev.ErrUnavailable},
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			// A machine under load takes some time for what the source answers at once.
			r := newRig(t, 2<<20, func(c *Config) {
				c.Timeout = 2 * time.Second
				if name == "never" {
					c.Timeout = 60 * time.Millisecond
					c.PrefetchIdle = c.Timeout
				}
			})
			r.source(fault.fetch)
			_, err := r.d.ReadAt(t.Context(), make([]byte, 1000), 123_456)
			if !errors.Is(err, fault.want) {
				t.Fatalf("read: %v, want %v", err, fault.want)
			}
			for _, part := range []string{r.ix.DiffID.String(), "123456"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("the error does not name %s: %v", part, err)
				}
			}
			if r.Stats().Failed != 1 {
				t.Errorf("%d failed reads counted", r.Stats().Failed)
			}
			if err := r.d.Prefetch(t.Context()); !errors.Is(err, fault.want) {
				t.Errorf("prefetch: %v, want %v", err, fault.want)
			}
			if n := r.present(); n != 0 {
				t.Errorf("%d chunks present", n)
			}
			// And all is well when the source is.
			r.quiet()
			r.Cache.cfg.Timeout, r.Cache.cfg.PrefetchIdle = time.Minute, time.Minute
			r.source(r.mem.Fetch)
			r.checkRead(0, 1<<20)
			r.prefetch()
		})
	}
}

// TestReadOutlivesShortOutage: a source that comes back within Timeout costs
// nobody a read.
func TestReadOutlivesShortOutage(t *testing.T) {
	r := newRig(t, 2<<20, nil)
	var calls atomic.Int64
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		switch calls.Add(1) {
		case 1:
			return fmt.Errorf("restarting: %w", blockdev.ErrUnavailable)
		case 2: // half of it, then wrong bytes
			for i := range req.Chunks[:len(req.Chunks)/2] {
				if err := deliver(i, r.data[req.Chunks[i].Offset:][:req.Chunks[i].Length]); err != nil {
					return err
				}
			}
			return deliver(len(req.Chunks)-1, []byte("wrong"))
		}
		return r.mem.Fetch(ctx, req, deliver)
	})
	r.checkRead(0, 1<<20)
	if calls.Load() != 3 || r.Stats().CorruptChunks != 1 || r.Stats().Failed != 0 {
		t.Errorf("%d requests, %+v", calls.Load(), r.Stats())
	}
}

// TestCorruptThenRight: the source delivers the same chunk again from elsewhere
// in the same request, and twice for good measure.
func TestCorruptThenRight(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	r.source(func(_ context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		for i, c := range req.Chunks {
			if err := deliver(i, make([]byte, c.Length)); !errors.Is(err, blockdev.ErrCorrupt) {
				t.Errorf("wrong bytes: %v, want ErrCorrupt", err)
			}
			for range 2 {
				if err := deliver(i, r.data[c.Offset:][:c.Length]); err != nil {
					t.Errorf("right bytes: %v", err)
				}
			}
		}
		return nil
	})
	r.checkRead(0, 1<<20)
	if s := r.Stats(); s.DemandBytes != 1<<20 || int(s.CorruptChunks) != len(r.ix.Chunks) {
		t.Errorf("%+v", s)
	}
}

func TestLateDeliveryIsRefused(t *testing.T) {
	r := newRig(t, 1<<20, func(c *Config) { c.Timeout = 50 * time.Millisecond })
	var late blockdev.Deliver
	r.source(func(_ context.Context, _ blockdev.Request, deliver blockdev.Deliver) error {
		late = deliver
		return blockdev.ErrNotFound
	})
	if _, err := r.d.ReadAt(t.Context(), make([]byte, 10), 0); !errors.Is(err, blockdev.ErrNotFound) {
		t.Fatal(err)
	}
	if err := late(0, r.data[:r.ix.Chunks[0].Length]); err == nil {
		t.Error("a delivery after the end of the request was taken")
	}
	if n := r.present(); n != 0 {
		t.Errorf("%d chunks present", n)
	}
}

// TestDamagedFiles flips bits of every file and shortens it, between two lives of
// the cache. Whatever is done, reads are right after it.
func TestDamagedFiles(t *testing.T) {
	cut := func(n int64) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			if err := os.Truncate(path, n); err != nil {
				t.Fatal(err)
			}
		}
	}
	flip := func(off int64) func(t *testing.T, path string) {
		return func(t *testing.T, path string) { flipFile(t, path, off) }
	}
	remove := func(t *testing.T, path string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		file, how string
		do        func(t *testing.T, path string)
		dropped   bool
		log       string
	}{
		{indexFile, "flip", flip(60), true, "is damaged and is removed"},
		{indexFile, "cut", cut(100), true, "is damaged and is removed"},
		{indexFile, "empty", cut(0), true, "is damaged and is removed"},
		{indexFile, "gone", remove, true, "is damaged and is removed"},
		{metaFile, "flip", flip(600), false, "metadata image of a diff is damaged"},
		{metaFile, "gone", remove, false, "metadata image of a diff is damaged"},
		{bitmapFile, "magic", flip(0), false, "cannot tell which chunks of a diff are on disk"},
		{bitmapFile, "DiffID", flip(20), false, "cannot tell which chunks of a diff are on disk"},
		{bitmapFile, "record", flip(presence.HeaderSize), false, "have damaged records"},
		{bitmapFile, "record sum", flip(presence.HeaderSize + 13), false, "have damaged records"},
		{bitmapFile, "cut", cut(presence.HeaderSize + 3), false, "cannot tell which chunks of a diff are on disk"},
		{bitmapFile, "long", cut(9000), false, "cannot tell which chunks of a diff are on disk"},
		{bitmapFile, "empty", cut(0), false, "cannot tell which chunks of a diff are on disk"},
		{bitmapFile, "gone", remove, false, "cannot tell which chunks of a diff are on disk"},
		{dataFile, "cut", cut(300_000), false, "cannot tell which chunks of a diff are on disk"},
		{dataFile, "long", cut(30 << 20), false, "cannot tell which chunks of a diff are on disk"},
		{dataFile, "gone", remove, false, "cannot tell which chunks of a diff are on disk"},
	} {
		t.Run(c.file+" "+c.how, func(t *testing.T) {
			r := newRig(t, 3<<20+5, nil)
			r.checkRead(0, 700_000)
			r.checkRead(2<<20, 100_000)
			path := filepath.Join(r.d.dir, c.file)
			r.crash(func() { c.do(t, path) })
			if r.log.count(c.log) != 1 {
				t.Errorf("no log line %q; log:\n%s", c.log, r.log.b.String())
			}
			if c.dropped {
				if _, ok := r.Get(r.ix.DiffID); ok {
					t.Fatal("a diff with a damaged index is served")
				}
				if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("its directory: %v", err)
				}
				r.d = r.add(r.ix)
			} else {
				r.expect()
			}
			if meta, err := os.ReadFile(r.d.MetaPath()); err != nil || !bytes.Equal(meta, r.ix.Meta) {
				t.Errorf("meta: %v", err)
			}
			r.present()
			r.checkRead(0, int(r.d.Size()))
			r.prefetch()
			r.reopen()
			if !r.d.Complete() || r.present() != r.d.tab.Len() {
				t.Error("not complete in the end")
			}
		})
	}
}

// TestBitmapRebuiltFromData: with the bitmap lost, what is on disk is found again
// by its digests and not fetched.
func TestBitmapRebuiltFromData(t *testing.T) {
	r := newRig(t, 3<<20, nil)
	r.prefetch()
	path := filepath.Join(r.d.dir, bitmapFile)
	r.crash(func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	})
	r.expect()
	if n := r.present(); n != 0 || r.d.Complete() {
		t.Errorf("%d chunks believed without a bitmap", n)
	}
	r.checkRead(1000, 200_000)
	r.prefetch()
	if s := r.Stats(); s.DemandBytes+s.PrefetchBytes != 0 || s.CopiedBytes != r.d.DiffSize() {
		t.Errorf("%+v", s)
	}
}

// TestForeignBitmap: the bitmap of another diff of the same shape.
func TestForeignBitmap(t *testing.T) {
	r := newRig(t, 3<<20, nil)
	other := *r.ix
	other.DiffID = blockdev.Sum([]byte("other"))
	d2 := r.add(&other)
	r.prefetch()
	b, err := os.ReadFile(filepath.Join(r.d.dir, bitmapFile))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(d2.dir, bitmapFile)
	r.crash(func() {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	d2, _ = r.Get(other.DiffID)
	if d2.Complete() || d2.Stat().ChunksPresent != 0 {
		t.Fatal("another diff's bitmap is believed")
	}
	r.check(d2, r.want, 0, len(r.want))
}

// TestUnreadableDataHeals: somebody cuts the data file under a running cache.
func TestUnreadableDataHeals(t *testing.T) {
	r := newRig(t, 3<<20, nil)
	r.prefetch()
	if err := os.Truncate(r.d.DataPath(), 1<<20); err != nil {
		t.Fatal(err)
	}
	r.checkRead(2<<20, 300_000)
	if r.d.Complete() || r.Stats().DamagedChunks == 0 {
		t.Error("no damage noted")
	}
}

// smallDisk mounts a tmpfs of n bytes.
func smallDisk(t *testing.T, n int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small tmpfs that fills up")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", n)); err != nil {
		t.Skipf("cannot mount a tmpfs here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestFullDisk: reads go on from memory, prefetch says ErrNoSpace, and both go on
// by themselves when there is space again.
func TestFullDisk(t *testing.T) {
	dir := smallDisk(t, 4<<20)
	r := newRig(t, 8<<20, func(c *Config) { c.Root = filepath.Join(dir, "cache") })
	if err := r.d.Prefetch(t.Context()); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Fatalf("prefetch to a full disk: %v", err)
	}
	for off := int64(0); off < r.d.Size(); off += 500_000 {
		r.checkRead(off, 500_000)
	}
	if n := r.log.count("the cache is full"); n != 1 {
		t.Errorf("a full disk was logged %d times", n)
	}
	n := r.present()
	if n == 0 || n == r.d.tab.Len() {
		t.Errorf("%d of %d chunks present", n, r.d.tab.Len())
	}
	other := *r.ix
	other.DiffID = blockdev.Sum([]byte("other"))
	other.Meta = make([]byte, 1<<20)
	if _, err := r.Add(t.Context(), encode(t, &other)); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Errorf("add to a full disk: %v", err)
	}
	r.reopen()
	if m := r.present(); m != n {
		t.Errorf("%d chunks present, %d before", m, n)
	}
	if err := r.d.Prefetch(t.Context()); !errors.Is(err, blockdev.ErrNoSpace) {
		t.Fatalf("prefetch to a full disk: %v", err)
	}
	r.checkRead(0, len(r.want))
	r.quiet()
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	r.prefetch()
	if n := r.present(); n != r.d.tab.Len() {
		t.Errorf("%d of %d chunks", n, r.d.tab.Len())
	}
	if n := r.log.count("can be written to again"); n != 1 {
		t.Errorf("the end of it was logged %d times", n)
	}
}

// TestReadsWhileDiskIsFull: many readers of the same chunks, which cannot be
// written, and a source that counts.
func TestReadsWhileDiskIsFull(t *testing.T) {
	dir := smallDisk(t, 1<<20)
	r := newRig(t, 4<<20, func(c *Config) { c.Root = filepath.Join(dir, "cache") })
	_ = r.d.Prefetch(t.Context())
	errs := make(chan error, 16)
	for range cap(errs) {
		go func() {
			p := make([]byte, 400_000)
			_, err := r.d.ReadAt(context.Background(), p, 3<<20)
			if err == nil && !bytes.Equal(p, r.want[3<<20:][:len(p)]) {
				err = errors.New("wrong bytes")
			}
			errs <- err
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}
