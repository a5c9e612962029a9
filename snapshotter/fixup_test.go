package snapshotter

import (
	"archive/tar"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// describe lists a tree: type, mode, owner, size, device number and extended
// attributes of each entry; times of what is listed in timed, since containerd
// leaves those of implied directories at the time of unpacking.
func describe(t testing.TB, root string) map[string]string {
	t.Helper()
	m := make(map[string]string)
	check(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		size := st.Size
		if d.IsDir() {
			size = 0
		}
		s := fmt.Sprintf("%o %d:%d size %d dev %x", st.Mode, st.Uid, st.Gid, size, st.Rdev)
		if d.Type().IsRegular() {
			s += " " + read(t, p)
		}
		names, err := xattrs(p)
		if err != nil {
			return err
		}
		for _, n := range names {
			v := make([]byte, 1024)
			k, err := unix.Lgetxattr(p, n, v)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %s=%q", n, v[:k])
		}
		rel, err := filepath.Rel(root, p)
		m[rel] = s
		return err
	}))
	return m
}

func owned(uid, gid int) func(*tar.Header) {
	return func(h *tar.Header) { h.Uid, h.Gid = uid, gid }
}

func xattr(name, value string) func(*tar.Header) {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = make(map[string]string)
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
}

func link2(name, target string) *tar.Header {
	return &tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}
}

// A lazy image looks as containerd's unpacking of it does, where layers have
// entries below directories that they have no entry for.
func TestFixupsAsContainerd(t *testing.T) {
	for _, c := range []struct {
		name   string
		layers [][]*tar.Header
	}{
		{"mode and owner", [][]*tar.Header{
			{dir("tmp", 0o1777), dir("home", 0o755), dir("home/u", 0o700, owned(1000, 1000)), file("home/u/a", owned(1000, 1000))},
			{file("tmp/x"), file("home/u/b", owned(1000, 1000))},
		}},
		{"setgid and xattrs", [][]*tar.Header{
			{dir("d", 0o2750, owned(0, 7), xattr("user.k", "v"), xattr("trusted.t", "v")), file("d/a")},
			{file("d/b")},
		}},
		{"nowhere below", [][]*tar.Header{
			{dir("a", 0o700)},
			{file("b/c/d")},
		}},
		{"part below", [][]*tar.Header{
			{dir("a", 0o711)},
			{file("a/b/c/d")},
			{dir("a/b", 0o750)},
			{file("a/b/c/e")},
		}},
		{"entry above implied", [][]*tar.Header{
			{dir("a", 0o700), dir("a/b", 0o1770)},
			{dir("a", 0o711, xattr("user.own", "1")), file("a/b/c")},
		}},
		{"through three layers", [][]*tar.Header{
			{dir("v", 0o700, owned(5, 5)), file("v/1")},
			{file("v/2")},
			{file("v/3")},
			{dir("v", 0o755), file("v/4")},
			{file("v/5")},
		}},
		{"opaque", [][]*tar.Header{
			{dir("o", 0o750, owned(3, 3)), file("o/old"), dir("o/sub", 0o700), file("o/sub/old")},
			{file("o/.wh..wh..opq"), file("o/new")},
			{file("o/more")},
		}},
		{"opaque parent of implied", [][]*tar.Header{
			{dir("o", 0o750), dir("o/s", 0o701), file("o/s/old")},
			{dir("o", 0o755), file("o/.wh..wh..opq"), file("o/s/new")},
		}},
		{"deleted and made again", [][]*tar.Header{
			{dir("d", 0o700), file("d/old")},
			{file(".wh.d")},
			{file("d/new")},
		}},
		{"file becomes directory", [][]*tar.Header{
			{file("x")},
			{file("x/y")},
		}},
		{"symlink below", [][]*tar.Header{
			{dir("usr", 0o755), dir("usr/lib", 0o711, owned(9, 9)), link2("lib", "usr/lib")},
			{file("lib/a")},
		}},
		{"symlink out of the root", [][]*tar.Header{
			{link2("l", "/../../../../etc")},
			{file("l/a")},
		}},
		{"whiteout alone", [][]*tar.Header{
			{dir("d", 0o711, owned(4, 4)), file("d/a"), file("d/b")},
			{file("d/.wh.a")},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var ls []layer
			for _, entries := range c.layers {
				ls = append(ls, newLayer(t, entries...))
			}
			img := newImage("registry.test/fix:1", ls...)
			trees := make([]map[string]string, 2)
			for i, lazy := range []bool{true, false} {
				n := newNode(t)
				if lazy {
					n.images.publish(img)
				}
				top, fetched, err := n.pull(bg, img)
				check(t, err)
				if lazy != (len(fetched) == 0) {
					t.Fatalf("lazy %v, fetched %v; log:\n%s", lazy, fetched, n.log.b.String())
				}
				trees[i] = describe(t, mounted(t, must(n.Prepare(bg, "c", top))(t)))
			}
			got, want := trees[0], trees[1]
			for p, w := range want {
				if got[p] != w {
					t.Errorf("%s\n lazy:       %s\n containerd: %s", p, got[p], w)
				}
			}
			for p := range got {
				if want[p] == "" {
					t.Errorf("%s is in the lazy image alone", p)
				}
			}
		})
	}
}

// Times of implied directories are those from below, where containerd leaves the
// time of unpacking.
func TestFixupTimes(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/fix:1", newLayer(t, dir("d", 0o755), file("d/a")), newLayer(t, file("d/b")))
	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	root := mounted(t, must(n.Prepare(bg, "c", top))(t))
	var st unix.Stat_t
	check(t, unix.Stat(filepath.Join(root, "d"), &st))
	if st.Mtim.Sec != 0 {
		t.Errorf("d has time %d, the layer below says 0", st.Mtim.Sec)
	}
}

// A layer that containerd unpacks on top of lazy ones finds their attributes.
func TestOrdinaryOnLazy(t *testing.T) {
	n := newNode(t)
	base := newImage("registry.test/b:1", newLayer(t, dir("d", 0o1777, owned(2, 3)), file("d/a")))
	img := newImage("registry.test/i:1", base.layers[0], newLayer(t, file("d/b")))
	n.images.publish(base)
	_, _, err := n.pull(bg, base)
	check(t, err)
	lower := base.chain(0)
	opt := snapshots.WithLabels(map[string]string{labelRef: img.chain(1)})
	mounts := must(n.Prepare(bg, "k", lower, opt))(t)
	check(t, applyTar(bg, mounts, img.layers[1].tar))
	check(t, n.Commit(bg, "top", "k", opt))
	tree := describe(t, mounted(t, must(n.Prepare(bg, "c", "top"))(t)))
	if !strings.HasPrefix(tree["d"], "41777 2:3") {
		t.Errorf("d: %s", tree["d"])
	}
}

// Fix-ups that went with the power are made again.
func TestFixupLost(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/fix:1",
		newLayer(t, dir("d", 0o1777), file("d/a")), newLayer(t, file("d/b")), newLayer(t, file("d/c")))
	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	entries := must(os.ReadDir(filepath.Join(n.root, "s")))(t)
	if len(entries) != 2 {
		t.Fatalf("%d directories, want 2 with fix-ups", len(entries))
	}
	for _, e := range entries {
		check(t, os.RemoveAll(filepath.Join(n.root, "s", e.Name())))
	}
	n.crash()
	tree := describe(t, mounted(t, must(n.Prepare(bg, "c", top))(t)))
	if !strings.HasPrefix(tree["d"], "41777 ") {
		t.Errorf("d: %s", tree["d"])
	}
}

// An index that implies what the layer does not have is refused.
func TestFixupOfWrongIndex(t *testing.T) {
	needRoot(t)
	own, lower := t.TempDir(), t.TempDir()
	check(t, os.MkdirAll(filepath.Join(lower, "a/b"), 0o755))
	check(t, os.Symlink("/etc", filepath.Join(own, "a")))
	for _, implied := range []string{"a", "a/b"} {
		_, err := fixup(bg, filepath.Join(t.TempDir(), "fs"), []string{implied}, own, []string{lower})
		if !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("implied %q: %v", implied, err)
		}
	}
}
