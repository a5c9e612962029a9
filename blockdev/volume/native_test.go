package volume

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev/mount"
)

// container is an overlayfs mount over a layer, as a container has one.
type container struct {
	t   testing.TB
	dir string
}

func newContainer(t testing.TB, lower string) *container {
	t.Helper()
	base := filepath.Join(t.TempDir(), "root")
	c := &container{t, filepath.Join(base, "rootfs")}
	for _, d := range []string{"rootfs", "upper", "work"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	opts := "index=off,lowerdir=" + lower + ",upperdir=" + filepath.Join(base, "upper") + ",workdir=" + filepath.Join(base, "work")
	if err := unix.Mount("overlay", c.dir, "overlay", 0, opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.end)
	return c
}

func (c *container) end() {
	if err := mount.Detach(c.dir); err != nil {
		c.t.Error(err)
	}
}

// read reads the layer's file, and not from the page cache.
func (c *container) read(l *layer) error {
	if err := forget(c.dir); err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(c.dir, "file"))
	if err == nil && !bytes.Equal(got, l.content) {
		err = errors.New("other bytes")
	}
	return err
}

func (n *node) eventually(what string, ok func() bool) {
	n.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.t.Fatalf("never came true: %s", what)
		}
	}
}

func (n *node) lazyUsers(l *layer) int {
	n.t.Helper()
	users, err := n.LazyUsers()
	if err != nil {
		n.t.Fatal(err)
	}
	return users[l.id]
}

// tidyUp has the node unmount what was replaced, as it does after a while.
func (n *node) tidyUp() {
	for _, v := range n.volumes() {
		n.mounts.tidy(ctx, v, time.Now().Add(2*defaultRetire))
	}
}

// lookedUp is overlayfs in the middle of a mount: it has looked its lower directories up,
// and has not made its copies of their mounts.
func lookedUp(t *testing.T, lowers ...string) (create func() error) {
	t.Helper()
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range lowers {
		if err := unix.FsconfigSetString(fs, "lowerdir+", dir); errors.Is(err, unix.EINVAL) {
			t.Skip("overlayfs looks lower directories up one by one since Linux 6.7")
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return func() error { return errors.Join(unix.FsconfigCreate(fs), unix.Close(fs)) }
}

// TestReplacedMountStays: overlayfs that looked a lazy mount up just before the native one
// replaced it can be mounted; a while later nothing is left of the lazy mount.
func TestReplacedMountStays(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 74, 1<<20)
	n.add(l)
	lazy := n.mountDir(l)
	create := lookedUp(t, lazy, t.TempDir())
	if err := n.PrefetchWait(ctx, l.id, nil); err != nil {
		t.Fatal(err)
	}
	n.eventually("it is native", func() bool { return !n.stat(l).Lazy })
	if err := create(); err != nil {
		t.Errorf("overlayfs over the mount that was replaced: %v", err)
	}
	native := n.mountDir(l)
	n.tidyUp()
	if found := n.allMounts(); len(found) != 1 || found[0].Dir != native {
		t.Errorf("mounts: %+v", found)
	}
	if _, err := os.Lstat(lazy); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the mount point that was replaced: %v", err)
	}
}

// TestReplacedAgainAndAgain: a layer that is damaged and made whole more often than it
// can have mount points is mounted as it should be each time, and the oldest mount goes, also
// after a restart.
func TestReplacedAgainAndAgain(t *testing.T) {
	k := newKeeper(t)
	n := newNode(t, func(c *Config) { c.Keep = k })
	l := newLayer(t, 75, 1<<20)
	n.add(l)
	n.mountDir(l)
	if err := n.PrefetchWait(ctx, l.id, nil); err != nil {
		t.Fatal(err)
	}
	v, err := n.volume(l.id)
	if err != nil {
		t.Fatal(err)
	}
	show := func() {
		t.Helper()
		if err := v.take(ctx); err != nil {
			t.Fatal(err)
		}
		_, err := n.mounts.show(v)
		v.give()
		if err != nil {
			t.Fatal(err)
		}
		n.check(l, n.mountDir(l))
	}
	for range 7 {
		show()
	}
	if found := n.allMounts(); len(found) != len(n.mounts.places(l.id)) {
		t.Errorf("mounts: %+v", found)
	}
	before := v.mountPoints()
	n.restart()
	if v, err = n.volume(l.id); err != nil {
		t.Fatal(err)
	}
	if after := v.mountPoints(); !slices.Equal(after, before) {
		t.Errorf("mounts from the oldest on: %v, before the restart %v", after, before)
	}
	if show(); !slices.Equal(v.mountPoints()[:len(before)-1], before[1:]) {
		t.Errorf("mounts: %v, before that %v; the oldest goes", v.mountPoints(), before)
	}
	if err := n.Remove(ctx, l.id); err != nil {
		t.Fatal(err)
	}
	if found := n.allMounts(); len(found) != 0 {
		t.Errorf("mounts after the removal: %+v", found)
	}
}

// TestNativeWhenComplete: a layer that has become complete is mounted natively, whoever
// uses the lazy mount. Containers that start from then on need
// no process. Those from before read on, and with loop devices they do not need it
// either.
func TestNativeWhenComplete(t *testing.T) {
	for name, loop := range map[string]bool{"file": false, "loop": true} {
		t.Run(name, func(t *testing.T) {
			k := newKeeper(t)
			n := newNode(t, func(c *Config) { c.Loop, c.Keep = loop, k })
			l := newLayer(t, 70, 8<<20)
			n.add(l)
			dir := n.mountDir(l)
			old := newContainer(t, dir)
			inside, err := os.Open(filepath.Join(dir, "file")) // this alone makes unmount(2) fail
			if err != nil {
				t.Fatal(err)
			}
			n.checkPart(l, inside, 0, 100_000)
			if loop {
				n.checkDirect(l, map[string]string{n.mounts.fusePath(l.id): "1", n.diffFile(l, "meta"): "0"})
			}
			if got := n.lazyUsers(l); got != 1 {
				t.Errorf("%d containers on a lazy mount, want 1", got)
			}
			if err := n.PrefetchWait(ctx, l.id, nil); err != nil {
				t.Fatal(err)
			}
			n.eventually("it is mounted natively, and nobody asked for it", func() bool { return !n.stat(l).Lazy })
			lazy := dir
			if dir = n.mountDir(l); (dir == lazy) != loop {
				t.Errorf("mounted at %s, before at %s", dir, lazy)
			}
			young := newContainer(t, dir)
			for who, c := range map[string]*container{"old": old, "new": young} {
				if err := c.read(l); err != nil {
					t.Errorf("%s container: %v", who, err)
				}
			}
			n.checkPart(l, inside, 4<<20, 1<<20)
			want := 1
			if loop {
				want = 0
			}
			if loop {
				n.checkDirect(l, map[string]string{n.diffFile(l, "data"): "0", n.diffFile(l, "meta"): "0"})
			}
			if got := n.lazyUsers(l); got != want {
				t.Errorf("%d containers read through FUSE, want %d", got, want)
			}
			if n.mounts.marked(l.id) {
				t.Error("still marked as lazy")
			}
			if n.tidyUp(); loop == (len(n.allMounts()) != 1) {
				t.Errorf("mounts while a file is open in the lazy one: %+v", n.allMounts())
			}
			if err := inside.Close(); err != nil {
				t.Fatal(err)
			}
			if n.tidyUp(); len(n.allMounts()) != 1 {
				t.Errorf("mounts: %+v", n.allMounts())
			}

			// The process ends for good, and who keeps its descriptors, too.
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
			for name := range k.kept {
				if err := k.Drop(name); err != nil {
					t.Fatal(err)
				}
			}
			if err := young.read(l); err != nil {
				t.Errorf("new container, with nobody there: %v", err)
			}
			if err := old.read(l); (err == nil) != loop {
				t.Errorf("old container, with nobody there: %v", err)
			}
			if err := newContainer(t, dir).read(l); err != nil {
				t.Errorf("container that starts with nobody there: %v", err)
			}
			n.open()
			old.end()
			if got := n.lazyUsers(l); got != 0 {
				t.Errorf("%d containers read through FUSE after the last of them has ended", got)
			}
		})
	}
}

// TestNativeAfterCrash: a process that ended while it mounted a layer anew leaves it
// to the next one.
func TestNativeAfterCrash(t *testing.T) {
	k := newKeeper(t)
	n := newNode(t, func(c *Config) { c.Keep = k })
	l := newLayer(t, 71, 1<<20)
	n.add(l)
	dir := n.mountDir(l)
	if err := n.PrefetchWait(ctx, l.id, nil); err != nil {
		t.Fatal(err)
	}
	dir = n.mountDir(l)
	other := n.mounts.places(l.id)[3]
	mountLazily := func(dir string) error {
		_, err := mount.Mount(n.diffFile(l, "meta"), n.mounts.fusePath(l.id), dir, mount.Options{})
		return err
	}
	for name, leave := range map[string]func() error{
		"both are mounted and the marker is left": func() error { return n.mounts.mark(l.id) },
		"both are mounted as versions before did": func() error { return errors.Join(mountLazily(dir), n.mounts.mark(l.id)) },
		"it has not begun": func() error {
			return errors.Join(n.mounts.mark(l.id), mount.MkdirMountpoint(other), mountLazily(other), mount.Detach(dir))
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := leave(); err != nil {
				t.Fatal(err)
			}
			found := n.allMounts()
			c := newContainer(t, found[len(found)-1].Dir)
			defer c.end()
			n.restart()
			n.eventually("it is native", func() bool { return !n.stat(l).Lazy && !n.mounts.marked(l.id) })
			dir = n.mountDir(l)
			if n.tidyUp(); len(n.allMounts()) != 1 || n.allMounts()[0].Dir != dir {
				t.Errorf("mounts: %+v", n.allMounts())
			}
			n.check(l, dir)
			if err := c.read(l); err != nil {
				t.Error(err)
			}
		})
	}
}

func (n *node) allMounts() []mount.Info {
	n.t.Helper()
	found, err := mount.List(filepath.Join(n.root, mountsDir))
	if err != nil {
		n.t.Fatal(err)
	}
	return found
}

// checkDirect compares how the loop devices over a layer's files read them: "1" with
// direct I/O, "0" through the page cache.
func (n *node) checkDirect(l *layer, want map[string]string) {
	n.t.Helper()
	found, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		n.t.Fatal(err)
	}
	got := make(map[string]string)
	for _, path := range found {
		// Devices of others come and go meanwhile.
		backing, _ := os.ReadFile(path)
		direct, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "dio"))
		if file := strings.TrimSpace(string(backing)); strings.HasPrefix(file, n.root) && strings.Contains(file, l.id.Hex()) {
			got[file] = strings.TrimSpace(string(direct))
		}
	}
	if !maps.Equal(got, want) {
		n.t.Errorf("loop devices and their direct I/O: %v, want %v", got, want)
	}
}

func (n *node) diffFile(l *layer, name string) string {
	return filepath.Join(n.root, "diffs", l.id.Hex(), name)
}

// TestLostLoop: with loop devices, what is complete survives the loss of the
// connection; containers read on once there is a process again.
func TestLostLoop(t *testing.T) {
	n := newNode(t, func(c *Config) { c.Loop = true })
	l := newLayer(t, 72, 1<<20)
	n.add(l)
	dir := n.mountDir(l)
	if err := n.PrefetchWait(ctx, l.id, nil); err != nil {
		t.Fatal(err)
	}
	n.mountDir(l)
	// As if it had ended just before it switched the device.
	if _, err := mount.Switch(n.diffFile(l, "data"), n.mounts.fusePath(l.id)); err != nil {
		t.Fatal(err)
	}
	if err := n.mounts.mark(l.id); err != nil {
		t.Fatal(err)
	}
	c := newContainer(t, dir)
	id := mountID(t, dir)
	// The node ends at any time after that, and the kernel then cannot ask for the size of
	// what the device is over: not even later than it believes names that it has seen.
	time.Sleep(1200 * time.Millisecond)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.read(l); err == nil {
		t.Error("the device was not over FUSE")
	}
	n.open()
	// Diffs are opened, and devices switched, in the background.
	n.eventually("the device is over the data", func() bool {
		s, ok := n.Stat(l.id)
		return ok && s.Dir != "" && !s.Lazy
	})
	if err := c.read(l); err != nil || mountID(t, dir) != id {
		t.Errorf("container: %v; %+v", err, n.stat(l))
	}
}

// TestUnopenedKeepsItsMount: a diff that cannot be opened at a start, for a reason that
// passes, keeps its mount and gets its volume back without a restart.
func TestUnopenedKeepsItsMount(t *testing.T) {
	for name, complete := range map[string]bool{"native": true, "lazy": false} {
		t.Run(name, func(t *testing.T) {
			k := newKeeper(t)
			n := newNode(t, func(c *Config) { c.Keep = k })
			l := newLayer(t, 73, 1<<20)
			n.add(l)
			if complete {
				n.mountDir(l) // and replaced below, so there are two mounts
				if err := n.PrefetchWait(ctx, l.id, nil); err != nil {
					t.Fatal(err)
				}
			}
			dir := n.mountDir(l)
			n.check(l, dir)
			id := mountID(t, dir)
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
			// A directory in the file's place is no damage, but cannot be read.
			index, aside := n.diffFile(l, "index"), n.diffFile(l, "index.aside")
			if err := errors.Join(os.Rename(index, aside), os.Mkdir(index, 0o700)); err != nil {
				t.Fatal(err)
			}
			n.open()
			if n.Has(l.id) {
				t.Fatal("it was opened")
			}
			if complete {
				n.check(l, dir)
			}
			if in := n.checkAll(true); len(in.Findings) != 0 {
				t.Errorf("a check finds %+v", in.Findings)
			}
			if err := errors.Join(os.Remove(index), os.Rename(aside, index)); err != nil {
				t.Fatal(err)
			}
			n.eventually("it is open", func() bool { return n.Has(l.id) })
			if n.mountDir(l) != dir || mountID(t, dir) != id || n.stat(l).Lazy == complete {
				t.Errorf("after that: %+v", n.stat(l))
			}
			n.check(l, dir)

			// Removed while it cannot be opened, it is gone as well.
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.Rename(index, aside), os.Mkdir(index, 0o700)); err != nil {
				t.Fatal(err)
			}
			n.open()
			if err := n.Remove(ctx, l.id); err != nil {
				t.Fatal(err)
			}
			left, err := os.ReadDir(filepath.Join(n.root, "diffs"))
			if found, lerr := mount.List(filepath.Join(n.root, mountsDir)); err != nil || lerr != nil || len(left)+len(found) != 0 {
				t.Errorf("left behind: %v %v, %v %v", left, found, err, lerr)
			}
		})
	}
}
