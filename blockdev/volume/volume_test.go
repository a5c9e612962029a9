package volume

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/mount"
)

var ctx = context.Background()

func TestLazyThenNative(t *testing.T) {
	for name, loop := range map[string]bool{"file": false, "loop": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, func(c *Config) { c.Loop = loop })
			l := newLayer(t, 1, 3<<20)
			n.add(l)
			n.add(l)
			dir := n.mountDir(l)
			if s := n.stat(l); s.Complete || !s.Lazy || s.Dir != dir || s.Total != int64(len(l.data)) || s.Local != 0 {
				t.Errorf("after mount: %+v", s)
			}
			n.check(l, dir) // cold
			n.check(l, dir) // warm
			var last [2]int64
			if err := n.PrefetchWait(ctx, l.id, func(local, total int64) { last = [2]int64{local, total} }); err != nil {
				t.Fatal(err)
			}
			if last != [2]int64{int64(len(l.data)), int64(len(l.data))} {
				t.Errorf("last progress is %v", last)
			}
			n.check(l, n.mountDir(l))
			if s := n.stat(l); s.Lazy {
				t.Errorf("after prefetch: %+v", s)
			}
			n.check(l, dir) // whoever was told of it may still come
			if err := n.Remove(ctx, l.id); err != nil {
				t.Fatal(err)
			}
			if n.Has(l.id) || len(n.Stats()) != 0 {
				t.Error("removed diff is still there")
			}
			if _, err := n.Mount(ctx, l.id); !errors.Is(err, blockdev.ErrNotFound) {
				t.Errorf("mount of a removed diff: %v", err)
			}
			if err := n.Remove(ctx, l.id); err != nil {
				t.Errorf("second remove: %v", err)
			}
			// And back: complete before it is mounted this time.
			n.add(l)
			if err := n.PrefetchWait(ctx, l.id, nil); err != nil {
				t.Fatal(err)
			}
			n.check(l, n.mountDir(l))
			if s := n.stat(l); s.Lazy {
				t.Errorf("complete diff is mounted through FUSE: %+v", s)
			}
		})
	}
}

// TestOneThread does it on one of Go's CPUs: mount(2) of a lazy diff waits for
// answers of this very process.
func TestOneThread(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	TestLazyThenNative(t)
}

func TestMountOnce(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 2, 1<<20)
	n.add(l)
	var wg sync.WaitGroup
	dirs := make([]string, 16)
	for i := range dirs {
		wg.Go(func() {
			dir, err := n.Mount(ctx, l.id)
			if err != nil {
				t.Error(err)
				return
			}
			dirs[i] = dir
			n.check(l, dir)
		})
	}
	wg.Wait()
	for _, d := range dirs {
		if d != dirs[0] {
			t.Errorf("mounted at %s and %s", d, dirs[0])
		}
	}
	if found, err := mount.List(filepath.Join(n.root, mountsDir)); err != nil || len(found) != 1 {
		t.Errorf("%+v, %v", found, err)
	}
	if name := filepath.Base(dirs[0]); len(name) != nameDigits {
		t.Errorf("name %s is not short", name)
	}
}

// TestAddRemove has everything go on at once.
func TestAddRemove(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 3, 256<<10)
	n.src.PutLayer(l.Layer)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				if _, err := n.Add(ctx, l.encoded); err != nil {
					t.Errorf("add: %v", err)
				}
				n.Prefetch(l.id)
				if _, err := n.Mount(ctx, l.id); err != nil && !errors.Is(err, blockdev.ErrNotFound) {
					t.Errorf("mount: %v", err)
				}
				n.Stats()
				if err := n.Remove(ctx, l.id); err != nil {
					t.Errorf("remove: %v", err)
				}
			}
		})
	}
	wg.Wait()
	n.add(l)
	n.check(l, n.mountDir(l))
}

func TestRemoveInUse(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 4, 1<<20)
	n.add(l)
	dir := n.mountDir(l)
	f, err := os.Open(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n.checkPart(l, f, 0, 4096)
	if err := n.Remove(ctx, l.id); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("mount point stays: %v", err)
	}
	if _, err := f.ReadAt(make([]byte, 4096), 1<<19); err == nil {
		t.Error("bytes of a removed diff that were never here could be read")
	}
	if entries, err := os.ReadDir(filepath.Join(n.root, "diffs")); err != nil || len(entries) != 0 {
		t.Errorf("bytes are not freed: %v, %v", entries, err)
	}
}

// TestRestart leaves one diff of each kind behind.
func TestRestart(t *testing.T) {
	n := newNode(t, nil)
	native, lazy, became, unmounted, orphan := newLayer(t, 5, 1<<20), newLayer(t, 6, 1<<20), newLayer(t, 7, 1<<20), newLayer(t, 8, 1<<20), newLayer(t, 9, 1<<20)
	for _, l := range []*layer{native, lazy, became, unmounted, orphan} {
		n.add(l)
	}
	for _, l := range []*layer{native, orphan} {
		if err := n.PrefetchWait(ctx, l.id, nil); err != nil {
			t.Fatal(err)
		}
	}
	dirs := map[*layer]string{}
	for _, l := range []*layer{native, lazy, became, orphan} {
		dirs[l] = n.mountDir(l)
	}
	if err := n.PrefetchWait(ctx, became.id, nil); err != nil {
		t.Fatal(err)
	}
	// A file that a container has open in a native mount survives everything.
	f, err := os.Open(filepath.Join(dirs[native], "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	before := mountID(t, dirs[native])

	if _, err := Open(ctx, n.cfg); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Fatalf("opened twice: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Mount(ctx, unmounted.id); err == nil {
		t.Error("closed, but mounts")
	}
	n.checkPart(native, f, 1<<19, 4096)
	if _, err := os.ReadFile(filepath.Join(dirs[lazy], "file")); err == nil {
		t.Error("nobody serves it, but it can be read")
	}
	// Another process took the diff away without its mount, and left a marker and
	// a mount point.
	if err := os.RemoveAll(filepath.Join(n.root, "diffs", orphan.id.Hex())); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{filepath.Join(mountsDir, "0123456789ab"), filepath.Join(lazyDir, orphan.id.Hex())} {
		if err := os.Mkdir(filepath.Join(n.root, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	n.open()

	for l, wantLazy := range map[*layer]bool{native: false, lazy: true, became: false} {
		s := n.stat(l)
		if s.Dir != dirs[l] && l != became || s.Lazy != wantLazy {
			t.Errorf("after restart: %+v, want lazy=%v at %s", s, wantLazy, dirs[l])
		}
		n.check(l, n.mountDir(l))
	}
	if mountID(t, dirs[native]) != before {
		t.Error("the native mount was not adopted, but made again")
	}
	if s := n.stat(unmounted); s.Dir != "" {
		t.Errorf("was not mounted, but is now: %+v", s)
	}
	found, err := mount.List(n.root)
	if err != nil || len(found) != 4 { // three diffs and FUSE
		t.Errorf("%+v, %v", found, err)
	}
	for sub, want := range map[string]int{mountsDir: 3, lazyDir: 1} {
		if entries, err := os.ReadDir(filepath.Join(n.root, sub)); err != nil || len(entries) != want {
			t.Errorf("%s has %v, want %d", sub, entries, want)
		}
	}
	_ = f.Close()
}

func mountID(t *testing.T, dir string) uint64 {
	t.Helper()
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_MNT_ID, &st); err != nil {
		t.Fatal(err)
	}
	return st.Mnt_id
}

func TestRestartLoop(t *testing.T) {
	n := newNode(t, func(c *Config) { c.Loop = true })
	native, lazy := newLayer(t, 10, 1<<20), newLayer(t, 11, 1<<20)
	n.add(native)
	n.add(lazy)
	if err := n.PrefetchWait(ctx, native.id, nil); err != nil {
		t.Fatal(err)
	}
	id := mountID(t, n.mountDir(native))
	n.mountDir(lazy)
	n.restart()
	n.check(native, n.mountDir(native))
	n.check(lazy, n.mountDir(lazy))
	if mountID(t, n.mountDir(native)) != id || n.stat(native).Lazy || !n.stat(lazy).Lazy {
		t.Errorf("%+v %+v", n.stat(native), n.stat(lazy))
	}
}

// TestDeadMounts opens after a process that died, twice, and left its FUSE mount.
func TestDeadMounts(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 12, 1<<20)
	n.add(l)
	for range 3 {
		dir := n.mountDir(l)
		n.check(l, dir)
		n.restart()
	}
	if found, err := mount.List(filepath.Join(n.root, fuseDir)); err != nil || len(found) != 1 {
		t.Errorf("FUSE mounts: %+v, %v", found, err)
	}
}

func TestSourceDown(t *testing.T) {
	n := newNode(t, func(c *Config) { c.Cache.Timeout, c.ReadTimeout = 100e6, 200e6 })
	l, other := newLayer(t, 13, 4<<20), newLayer(t, 14, 1<<20)
	n.add(l)
	n.add(other)
	n.check(other, n.mountDir(other))
	n.src.turn(blockdev.ErrUnavailable)
	dir := n.mountDir(l)
	if _, err := os.ReadFile(filepath.Join(dir, "file")); !errors.Is(err, unix.EIO) {
		t.Errorf("read with the source down: %v, want EIO", err)
	}
	if err := n.PrefetchWait(ctx, l.id, nil); !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("prefetch with the source down: %v", err)
	}
	n.check(other, n.mountDir(other))
	if s := n.stat(l); s.Prefetch != Waiting {
		t.Errorf("a failed prefetch is %v", s.Prefetch)
	}
	n.src.turn(nil)
	n.check(l, dir)
	if err := n.PrefetchWait(ctx, l.id, nil); err != nil {
		t.Errorf("prefetch with the source back: %v", err)
	}
}

// TestStopsPrefetch removes a diff while its prefetch hangs.
func TestStopsPrefetch(t *testing.T) {
	n := newNode(t, func(c *Config) { c.PrefetchDiffs = 1 })
	l := newLayer(t, 15, 1<<20)
	n.add(l)
	entered := make(chan struct{}, 16)
	m, err := Open(ctx, Config{Root: filepath.Join(t.TempDir(), "root"), Log: n.cfg.Log})
	if err != nil {
		t.Fatal(err)
	}
	err = m.Attach(Upstream{Source: blockdevtest.SourceFunc(func(ctx context.Context, _ blockdev.Request, _ blockdev.Deliver) error {
		entered <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	})})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.UnmountAll(ctx); err != nil {
			t.Error(err)
		}
	}()
	if _, err := m.Add(ctx, l.encoded); err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() { waited <- m.PrefetchWait(ctx, l.id, nil) }()
	<-entered
	if err := m.Remove(ctx, l.id); err != nil {
		t.Error(err)
	}
	if err := <-waited; err == nil {
		t.Error("the prefetch of a removed diff succeeded")
	}
}

func TestOpenErrors(t *testing.T) {
	for name, c := range map[string]Config{
		"no root": {},
		"comma":   {Root: filepath.Join(t.TempDir(), "a,b")},
	} {
		if m, err := Open(ctx, c); err == nil {
			t.Errorf("%s: opened", name)
			_ = m.UnmountAll(ctx)
		}
	}
}

func TestBadIndex(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 16, 1<<20)
	bad := bytes.Clone(l.encoded)
	bad[len(bad)/2] ^= 1
	if _, err := n.Add(ctx, bad); err == nil {
		t.Error("a damaged index was taken")
	}
	if len(n.Stats()) != 0 {
		t.Error("something was kept of it")
	}
}

// TestNames: diffs whose names begin alike get different mount points.
func TestNames(t *testing.T) {
	m := newMounter(Config{}, "")
	seen := map[string]bool{}
	for i := range 5 {
		var id blockdev.Digest
		for j := range i * nameDigits / 2 {
			id[nameDigits/2+j] = 0 // the same first part
		}
		id[31] = byte(i) // outside every part of 12 digits but the last
		for j := 1; j <= i && j < 5; j++ {
			id[nameDigits/2*j+5] = byte(i)
		}
		name := filepath.Base(m.free(id, "", nil))
		if seen[name] || len(name) != nameDigits {
			t.Errorf("diff %d: %s", i, name)
		}
		seen[name] = true
		if again := filepath.Base(m.free(id, "", nil)); again != name {
			t.Errorf("diff %d: %s and then %s", i, name, again)
		}
	}
	m.names = map[string]blockdev.Digest{strings.Repeat("0", nameDigits): {31: 9}}
	if dir := m.free(blockdev.Digest{}, "", nil); dir != "" {
		t.Errorf("got %s, which is taken", dir)
	}
}
