package volume

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/mount"
)

func (n *node) checkAll(repair bool) *cache.Inspection {
	n.t.Helper()
	in, _, err := n.Verify(context.Background(), repair, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	return in
}

func says(found []blockdev.Finding, text string) *blockdev.Finding {
	for i := range found {
		if strings.Contains(found[i].Where+" "+found[i].Problem, text) {
			return &found[i]
		}
	}
	return nil
}

// damage flips a bit of a diff's file.
func (n *node) damage(l *layer, name string, off int64) {
	n.t.Helper()
	f, err := os.OpenFile(filepath.Join(n.root, "diffs", l.id.Hex(), name), os.O_RDWR, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	defer f.Close()
	b := []byte{0}
	if _, err := f.ReadAt(b, off); err != nil {
		n.t.Fatal(err)
	}
	b[0] ^= 8
	if _, err := f.WriteAt(b, off); err != nil {
		n.t.Fatal(err)
	}
}

// TestCheck: what is damaged under a running node is found, said, and with repair
// right again when Check returns.
func TestCheck(t *testing.T) {
	n := newNode(t, nil)
	whole, part := newLayer(t, 50, 1<<20), newLayer(t, 51, 1<<20)
	n.add(whole)
	n.add(part)
	if err := n.PrefetchWait(t.Context(), whole.id, nil); err != nil {
		t.Fatal(err)
	}
	n.mountDir(whole)
	n.check(part, n.mountDir(part))
	if in := n.checkAll(false); len(in.Findings) != 0 || in.Diffs != 2 || in.Complete < 1 || in.Proven < 1 {
		t.Fatalf("all is well: %+v", in)
	}
	n.damage(whole, "data", 9000)
	n.damage(whole, "meta", 1100)
	n.damage(part, "bitmap", 20)
	in := n.checkAll(true)
	for _, text := range []string{"is damaged on this disk", "metadata image", "bitmap"} {
		if f := says(in.Findings, text); f == nil || f.Repaired == "" {
			t.Errorf("%q is not found and repaired: %+v", text, in.Findings)
		}
	}
	if in := n.checkAll(false); len(in.Findings) != 0 || in.Diffs != 2 {
		t.Fatalf("after the repair: %+v", in)
	}
	if !n.stat(whole).Complete {
		t.Error("the repair was not waited for")
	}
	// The damaged index of a running diff is said, and what to do.
	n.damage(part, "index", 150)
	if f := says(n.checkAll(true).Findings, "index of diff"); f == nil || f.Repaired != "" || !strings.Contains(f.Problem, "restart the node") {
		t.Errorf("damaged index: %+v", f)
	}
}

// TestCheckMounts: a mount of no layer is found and taken away; those of layers stay.
func TestCheckMounts(t *testing.T) {
	n := newNode(t, nil)
	l := newLayer(t, 52, 1<<20)
	n.add(l)
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	dir := n.mountDir(l)
	nobody := filepath.Join(n.root, "m", "nobody")
	if err := os.Mkdir(nobody, 0o700); err != nil {
		t.Fatal(err)
	}
	base := filepath.Join(n.root, "diffs", l.id.Hex())
	copied := filepath.Join(t.TempDir(), "meta")
	b, err := os.ReadFile(filepath.Join(base, "meta"))
	if err == nil {
		err = os.WriteFile(copied, b, 0o600)
	}
	if err == nil {
		_, err = mount.Mount(copied, filepath.Join(base, "data"), nobody, mount.Options{})
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(nobody, unix.MNT_DETACH) })
	in := n.checkAll(false)
	if f := says(in.Findings, nobody); f == nil || f.Repaired != "" || len(in.Findings) != 1 {
		t.Fatalf("running: %+v", in.Findings)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	mounts, found, err := InspectMounts(n.root, true)
	if f := says(found, nobody); err != nil || f == nil || f.Repaired == "" || len(found) != 1 || mounts != 2 {
		t.Errorf("stopped: %d mounts, %+v, %v", mounts, found, err)
	}
	if _, found, err := InspectMounts(n.root, true); err != nil || len(found) != 0 {
		t.Errorf("after the repair: %+v, %v", found, err)
	}
	n.open()
	if got := n.mountDir(l); got != dir {
		t.Errorf("the layer's own mount moved from %s to %s", dir, got)
	}
	n.check(l, dir)
}

// TestCheckLoops: a loop device of nobody is found and detached.
func TestCheckLoops(t *testing.T) {
	n := newNode(t, func(c *Config) { c.Loop = true })
	l := newLayer(t, 53, 1<<20)
	n.add(l)
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	n.mountDir(l)
	if in := n.checkAll(false); len(in.Findings) != 0 {
		t.Fatalf("loop devices in use: %+v", in.Findings)
	}
	other := newLayer(t, 54, 1<<20)
	n.add(other)
	attachLoop(t, filepath.Join(n.root, "diffs", other.id.Hex(), "data"))
	in := n.checkAll(true)
	if f := says(in.Findings, "loop device over"); f == nil || f.Repaired == "" || len(in.Findings) != 1 {
		t.Fatalf("a loop device of nobody: %+v", in.Findings)
	}
	if in := n.checkAll(false); len(in.Findings) != 0 {
		t.Errorf("after the repair: %+v", in.Findings)
	}
}

// TestCheckLoopsOfOwnTree: a layer that shows the tree of this node's own builder uses its
// loop devices as any other does.
func TestCheckLoopsOfOwnTree(t *testing.T) {
	n := newNode(t, func(c *Config) { c.Loop = true })
	l := newLayer(t, 55, 1<<20)
	l.builtByAnother(t)
	n.add(l)
	n.mountDir(l)
	if err := n.PrefetchWait(t.Context(), l.id, nil); err != nil {
		t.Fatal(err)
	}
	dir := n.mountDir(l)
	n.tidyUp()
	if found := n.allMounts(); len(found) != 1 || filepath.Base(found[0].Source) != "meta.own" {
		t.Fatalf("mounts: %+v", found)
	}
	if in := n.checkAll(true); len(in.Findings) != 0 {
		t.Errorf("loop devices in use: %+v", in.Findings)
	}
	n.check(l, dir)
}

// attachLoop attaches a loop device that stays without a mount.
func attachLoop(t *testing.T, path string) {
	t.Helper()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skip("needs loop devices: ", err)
	}
	defer ctl.Close()
	backing, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	for range 20 { // somebody else may take it first
		num, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		dev, err := os.OpenFile("/dev/loop"+strconv.Itoa(num), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_FD, int(backing.Fd()))
		dev.Close()
		if err == nil {
			t.Cleanup(func() { _ = clearLoop(dev.Name()) })
			return
		}
	}
	t.Fatal("no free loop device")
}
