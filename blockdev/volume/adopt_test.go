package volume

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/fusefs"
	"github.com/shoalfs/shoal/blockdev/mount"
)

// keeper keeps copies of descriptors in this process.
type keeper struct {
	t    *testing.T
	mu   sync.Mutex
	kept map[string]int
}

func newKeeper(t *testing.T) *keeper {
	k := &keeper{t: t, kept: map[string]int{}}
	t.Cleanup(func() {
		for name := range k.kept {
			_ = k.Drop(name)
		}
	})
	return k
}

func (k *keeper) Take(name string) *os.File {
	k.mu.Lock()
	defer k.mu.Unlock()
	fd, ok := k.kept[name]
	if !ok {
		return nil
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(dup, false)
	}
	if err != nil {
		k.t.Error(err)
	}
	return os.NewFile(uintptr(dup), name)
}

func (k *keeper) Keep(name string, f *os.File) error {
	if err := k.Drop(name); err != nil {
		return err
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return conn.Control(func(fd uintptr) {
		dup, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			k.t.Error(err)
		}
		k.kept[name] = dup
	})
}

func (k *keeper) Drop(name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if fd, ok := k.kept[name]; ok {
		delete(k.kept, name)
		return unix.Close(fd)
	}
	return nil
}

// TestTakeOver: with a keeper, lazy mounts go on after a restart, and reads that
// nobody answered in between are answered.
func TestTakeOver(t *testing.T) {
	for name, loop := range map[string]bool{"file": false, "loop": true} {
		t.Run(name, func(t *testing.T) {
			k := newKeeper(t)
			n := newNode(t, func(c *Config) { c.Keep, c.Loop = k, loop })
			lazy, native := newLayer(t, 60, 4<<20), newLayer(t, 61, 1<<20)
			n.add(lazy)
			n.add(native)
			if err := n.PrefetchWait(ctx, native.id, nil); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(filepath.Join(n.mountDir(lazy), "file"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			ids := [2]uint64{mountID(t, n.mountDir(lazy)), mountID(t, n.mountDir(native))}
			var wg sync.WaitGroup
			for round := range 3 {
				n.checkPart(lazy, f, int64(round)<<20, 4096)
				if err := n.Close(); err != nil {
					t.Fatal(err)
				}
				for i := range int64(4) {
					wg.Go(func() {
						buf := make([]byte, 4096)
						off := int64(round)<<20 + (i+1)*200_000
						if _, err := f.ReadAt(buf, off); err != nil || !bytes.Equal(buf, lazy.content[off:off+4096]) {
							t.Errorf("read over a restart: %v, or other bytes", err)
						}
					})
				}
				n.open()
				wg.Wait()
			}
			n.check(lazy, n.mountDir(lazy))
			if now := [2]uint64{mountID(t, n.mountDir(lazy)), mountID(t, n.mountDir(native))}; now != ids {
				t.Errorf("mounts %v, before the restarts %v", now, ids)
			}
			if s := n.stat(lazy); !s.Lazy {
				t.Errorf("%+v", s)
			}
			if err := n.Check(t.Context()); err != nil {
				t.Error(err)
			}
			// What the first process did not mount.
			other := newLayer(t, 62, 1<<20)
			n.add(other)
			n.check(other, n.mountDir(other))
			if found, err := mount.List(filepath.Join(n.root, fuseDir)); err != nil || len(found) != 1 {
				t.Errorf("FUSE mounts: %+v, %v", found, err)
			}
		})
	}
}

// TestStaleConnection: what was kept is of no use any more, in one way after the
// other. All is made anew, and kept.
func TestStaleConnection(t *testing.T) {
	k := newKeeper(t)
	n := newNode(t, func(c *Config) { c.Keep = k })
	l := newLayer(t, 63, 1<<20)
	n.add(l)
	spoil := map[string]func(){
		"aborted": func() {
			found, err := mount.List(filepath.Join(n.root, fuseDir))
			if err != nil || len(found) != 1 {
				t.Fatalf("%+v, %v", found, err)
			}
			abort := filepath.Join("/sys/fs/fuse/connections", strconv.Itoa(found[0].Minor), "abort")
			if err := os.WriteFile(abort, []byte("1"), 0); errors.Is(err, os.ErrNotExist) {
				if err := mount.Detach(filepath.Join(n.root, fuseDir)); err != nil {
					t.Fatal(err)
				}
			} else if err != nil {
				t.Fatal(err)
			}
		},
		"detached": func() {
			if err := mount.Detach(filepath.Join(n.root, fuseDir)); err != nil {
				t.Fatal(err)
			}
		},
		"mounted over": func() {
			fd, err := fusefs.Mount(filepath.Join(n.root, fuseDir))
			if err != nil {
				t.Fatal(err)
			}
			_ = fd.Close()
		},
		"no record":      func() { _ = k.Drop(keptInit) },
		"no connection":  func() { _ = k.Drop(keptFUSE) },
		"damaged record": func() { k.damage(t) },
	}
	for name, f := range spoil {
		t.Run(name, func(t *testing.T) {
			dir := n.mountDir(l)
			n.check(l, dir)
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
			f()
			n.open()
			if again := n.mountDir(l); again != dir {
				t.Errorf("mounted at %s, before at %s", again, dir)
			}
			n.check(l, dir)
			id := mountID(t, dir)
			n.restart()
			n.check(l, dir)
			if mountID(t, dir) != id {
				t.Error("the new connection was not kept")
			}
			if found, err := mount.List(filepath.Join(n.root, fuseDir)); err != nil || len(found) != 1 {
				t.Errorf("FUSE mounts: %+v, %v", found, err)
			}
		})
	}
}

// damage cuts the record of the connection short.
func (k *keeper) damage(t *testing.T) {
	f := k.Take(keptInit)
	defer f.Close()
	if err := f.Truncate(30); err != nil {
		t.Fatal(err)
	}
}

func TestUnmountAllDrops(t *testing.T) {
	k := newKeeper(t)
	n := newNode(t, func(c *Config) { c.Keep = k })
	if len(k.kept) != 3 {
		t.Errorf("%d descriptors are kept, want 3", len(k.kept))
	}
	if err := n.UnmountAll(ctx); err != nil {
		t.Fatal(err)
	}
	if len(k.kept) != 0 {
		t.Errorf("%d descriptors are still kept", len(k.kept))
	}
	n.open()
}

func TestDecodeConnection(t *testing.T) {
	k := newKeeper(t)
	newNode(t, func(c *Config) { c.Keep = k })
	f := k.Take(keptInit)
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, recordMost))
	if err != nil {
		t.Fatal(err)
	}
	major, minor, init, err := decodeConnection(b)
	if err != nil || !bytes.Equal(encodeConnection(mount.Info{Major: major, Minor: minor}, init), b) {
		t.Errorf("%d %d %x %v", major, minor, init, err)
	}
	for _, bad := range [][]byte{nil, b[:recordHeader], b[:len(b)-1], append([]byte("x"), b[1:]...), make([]byte, recordMost+1)} {
		if _, _, _, err := decodeConnection(bad); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("%d bytes: %v", len(bad), err)
		}
	}
}
