//go:build linux

package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// The judge: containerd unpacks the same tar for overlayfs into a directory, and
// the kernel mounts what Build made of it. The two must be equal.

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts EROFS, makes devices and trusted attributes")
	}
	if err := log.SetLevel("error"); err != nil { // containerd's, about attributes it passes over
		t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil || !strings.Contains(string(b), "\terofs\n") {
		t.Skipf("needs a kernel with EROFS (/proc/filesystems: %v)", err)
	}
}

// found is an inode as a user sees it.
type found struct {
	Mode, UID, GID uint32
	Rdev           uint64
	Size           int64
	Mtime          string
	Links          string // all names, of what has several
	Nlink          uint64 // not of directories
	Target         string
	Xattrs         string
	Sum            blockdev.Digest
}

// look reads a tree. unpacked says that it is containerd's.
func look(t *testing.T, root string, clocked map[string]bool) map[string]found {
	t.Helper()
	tree := map[string]found{}
	names := map[uint64][]string{}
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		name := strings.TrimPrefix(strings.TrimPrefix(p, root), "/")
		f := found{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Rdev: st.Rdev, Xattrs: attrsOf(t, p)}
		if !clocked[name] {
			f.Mtime = fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			f.Size = st.Size
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			f.Sum = blockdev.Sum(data)
		case unix.S_IFLNK:
			if f.Target, err = os.Readlink(p); err != nil {
				return err
			}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			f.Nlink = uint64(st.Nlink) //nolint:unconvert // 32 bits on arm64
			names[st.Ino] = append(names[st.Ino], name)
		}
		tree[name] = f
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, all := range names {
		slices.Sort(all)
		for _, n := range all {
			f := tree[n]
			f.Links = strings.Join(all, " ")
			tree[n] = f
		}
	}
	return tree
}

func attrsOf(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, name := range strings.Split(string(buf[:n]), "\x00") {
		if name == "" {
			continue
		}
		val := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(path, name, val)
		if err != nil {
			t.Fatalf("%s of %s: %v", name, path, err)
		}
		all = append(all, fmt.Sprintf("%s=%q", name, val[:n]))
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// mounted gives f the tree of an index, mounted by the kernel.
func mounted(t *testing.T, ix *blockdev.Index, masked []byte, f func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	meta, data, at := filepath.Join(dir, "meta"), filepath.Join(dir, "data"), filepath.Join(dir, "at")
	masked = append(masked, make([]byte, -len(masked)&4095)...)
	if len(masked) == 0 {
		masked = make([]byte, 4096)
	}
	for _, err := range []error{os.WriteFile(meta, ix.Meta, 0o600), os.WriteFile(data, masked, 0o600), os.Mkdir(at, 0o700)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount(meta, at, "erofs", unix.MS_RDONLY, "device="+data); err != nil {
		if errors.Is(err, unix.ENOTBLK) {
			t.Skip("needs file-backed EROFS mounts (Linux 6.12)")
		}
		t.Fatalf("mounting: %v", err)
	}
	defer func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmounting: %v", err)
		}
	}()
	f(at)
}

// compare reports whether both accepted diff, having compared the trees.
func compare(t *testing.T, diff []byte) bool {
	t.Helper()
	dir := t.TempDir()
	_, cerr := archive.Apply(t.Context(), dir, bytes.NewReader(diff), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	ix, masked, err := roundTrip(t, diff, Options{})
	if (err == nil) != (cerr == nil) {
		if err != nil && (strings.Contains(err.Error(), "leaves the root") || strings.Contains(err.Error(), "path over")) {
			return false // refused on purpose
		}
		t.Fatalf("containerd: %v\nwe: %v", cerr, err)
	}
	if err != nil {
		return false
	}
	// What has its time from the clock in containerd's tree.
	clocked := map[string]bool{"": true}
	for _, d := range ix.Implied {
		clocked[d] = true
	}
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		if st.Mode == unix.S_IFCHR && st.Rdev == 0 {
			clocked[strings.TrimPrefix(p, dir+"/")] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := look(t, dir, clocked)
	root := want[""]
	root.Mode, root.UID, root.GID = unix.S_IFDIR|0o755, 0, 0 // the snapshotter's, there
	want[""] = root
	mounted(t, ix, masked, func(at string) {
		got := look(t, at, clocked)
		for name, w := range want {
			if g, ok := got[name]; !ok {
				t.Errorf("%q is missing", name)
			} else if g != w {
				t.Errorf("%q\n got %+v\nwant %+v", name, g, w)
			}
		}
		for name := range got {
			if _, ok := want[name]; !ok {
				t.Errorf("%q is not there in containerd's tree", name)
			}
		}
	})
	return true
}

func TestContainerdTrees(t *testing.T) {
	needRoot(t)
	for _, tt := range trees {
		t.Run(tt.name, func(t *testing.T) {
			entries := slices.Clone(tt.entries)
			entries = slices.DeleteFunc(entries, func(e entry) bool { return e.realSize > 1<<24 }) // reading holes takes its time
			if !compare(t, makeTar(entries...)) {
				t.Error("not accepted")
			}
		})
	}
}

// TestContainerdRefuses: what containerd does not unpack cannot be lazy either, or the
// image would have no ordinary way to go.
func TestContainerdRefuses(t *testing.T) {
	needRoot(t)
	for name, entries := range map[string][]entry{
		"old GNU sparse": {oldSparse("f")},
		"old GNU sparse with a longer map and a long name": {{name: long, format: "old", gnuLong: true, realSize: 1 << 20,
			sparse: []part{{512, 512}, {4096, 512}, {8192, 512}, {16384, 512}, {32768, 512}}, data: strings.Repeat("o", 5*512)}},
		"unknown type": {{typ: '7', name: "a"}},
	} {
		if compare(t, makeTar(append(entries, file("behind", "x"))...)) {
			t.Errorf("%s: accepted", name)
		}
	}
	// Of a whiteout only the name counts, and where its data ends.
	if !compare(t, makeTar(oldSparse(whiteoutPrefix+"f"), file("behind", "x"))) {
		t.Error("a whiteout in the old GNU sparse format is refused")
	}
}

func TestContainerdRandom(t *testing.T) {
	needRoot(t)
	n := 150
	if testing.Short() {
		n = 20
	}
	accepted := 0
	for seed := range uint64(n) {
		r := rand.New(rand.NewPCG(seed, 42))
		diff := randomTar(r, 1+r.IntN(30), seed%2 == 0)
		ok := t.Run(fmt.Sprint(seed), func(t *testing.T) {
			if compare(t, diff) {
				accepted++
			}
		})
		if !ok {
			if f := os.Getenv("SHOAL_KEEP_TAR"); f != "" {
				if err := os.WriteFile(f, diff, 0o600); err != nil {
					t.Error(err)
				}
			}
			break
		}
	}
	t.Logf("%d of %d tars accepted", accepted, n)
	if accepted < n/2 {
		t.Errorf("only %d of %d tars were accepted; the test has no teeth", accepted, n)
	}
}
