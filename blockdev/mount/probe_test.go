package mount

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// TestProbe: this kernel shows all that images have, in both ways to mount them,
// also where an earlier probe was interrupted; nothing of it stays.
func TestProbe(t *testing.T) {
	needRoot(t)
	for _, loop := range []bool{false, true} {
		dir := filepath.Join(t.TempDir(), "probe")
		mnt := mkdir(t, dir, "mnt")
		if err := unix.Mount("left", mnt, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		if err := Probe(dir, Options{Loop: loop}); err != nil {
			t.Errorf("loop %t: %v", loop, err)
		}
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the probe's directory stays: %v", err)
		}
		if used := loops(t, dir); used != nil {
			t.Errorf("loop devices stay: %v", used)
		}
	}
}

// TestProbeMissing: where an attribute is not there, as with a kernel that lacks an
// option, the error says which option, and can be told apart.
func TestProbeMissing(t *testing.T) {
	dir := t.TempDir()
	attrs := attributes()
	for _, a := range attrs {
		if err := os.WriteFile(filepath.Join(dir, a.file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	err := checkAttributes(dir, attrs)
	if !errors.Is(err, blockdev.ErrUnsupported) {
		t.Fatalf("%v is not ErrUnsupported", err)
	}
	for _, option := range []string{"CONFIG_EROFS_FS_XATTR", "CONFIG_EROFS_FS_SECURITY", "CONFIG_EROFS_FS_POSIX_ACL"} {
		if !strings.Contains(err.Error(), option) {
			t.Errorf("%v does not name %s", err, option)
		}
	}
}

// TestDirect: files of an image that is mounted through loop devices take direct I/O,
// on the mount and through overlayfs; those of one that the kernel reads
// directly do not, which docs/limits.md says.
func TestDirect(t *testing.T) {
	needRoot(t)
	for _, loop := range []bool{false, true} {
		base := t.TempDir()
		meta, data, content := image(t, base)
		dir := mkdir(t, base, "dir")
		t.Cleanup(func() { _ = Detach(dir) })
		kind, err := Mount(meta, data, dir, Options{Loop: loop})
		if err != nil {
			t.Fatal(err)
		}
		merged := mkdir(t, base, "merged")
		if err := unix.Mount("overlay", merged, "overlay", 0,
			"lowerdir="+dir+",upperdir="+mkdir(t, base, "up")+",workdir="+mkdir(t, base, "work")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(merged, 0) })
		for _, d := range []string{dir, merged} {
			got, err := readDirect(filepath.Join(d, "file"), 8192)
			switch {
			case kind == File && !errors.Is(err, unix.EINVAL):
				t.Errorf("%s, mounted as %v: %v, want EINVAL: does the documentation still hold?", d, kind, err)
			case kind == Loop && (err != nil || string(got) != string(content[:8192])):
				t.Errorf("%s, mounted as %v: %v, or other bytes", d, kind, err)
			}
		}
	}
}

// TestNestedOverlay: overlayfs can be mounted inside a container, over its root, as
// container engines do there.
func TestNestedOverlay(t *testing.T) {
	needRoot(t)
	for _, loop := range []bool{false, true} {
		base := t.TempDir()
		meta, data, _ := image(t, base)
		layer := mkdir(t, base, "dir")
		t.Cleanup(func() { _ = Detach(layer) })
		kind, err := Mount(meta, data, layer, Options{Loop: loop})
		if err != nil {
			t.Fatal(err)
		}
		lower := layer
		for _, name := range []string{"root", "nested"} {
			dir := mkdir(t, base, name)
			opts := "lowerdir=" + lower + ",upperdir=" + mkdir(t, base, name+"-up") + ",workdir=" + mkdir(t, base, name+"-work")
			if err := unix.Mount("overlay", dir, "overlay", 0, opts); err != nil {
				t.Fatalf("%s over an image mounted as %v: %v", name, kind, err)
			}
			t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
			lower = dir
		}
		if _, err := os.Stat(filepath.Join(lower, "file")); err != nil {
			t.Error(err)
		}
	}
}

// readDirect reads the first n bytes of a file with O_DIRECT.
func readDirect(path string, n int) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	const align = 4096
	raw := make([]byte, n+align)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(raw)))) & (align - 1)
	got, err := unix.Pread(fd, raw[skip:skip+n], 0)
	return raw[skip : skip+max(got, 0)], err
}
