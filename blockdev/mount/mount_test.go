package mount

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/erofs"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts EROFS")
	}
}

// image writes an image with one file and a whiteout.
func image(t testing.TB, base string) (meta, data string, content []byte) {
	t.Helper()
	content = blockdevtest.Bytes(1, 1<<20)
	var buf bytes.Buffer
	err := erofs.Write(&buf, &erofs.Inode{Mode: unix.S_IFDIR | 0o755, Children: []erofs.Dirent{
		{Name: "file", Inode: &erofs.Inode{Mode: unix.S_IFREG | 0o4755, Size: int64(len(content)), Extents: []erofs.Extent{{Length: int64(len(content))}}}},
		{Name: "gone", Inode: &erofs.Inode{Mode: unix.S_IFCHR}},
	}}, int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	meta, data = filepath.Join(base, "meta"), filepath.Join(base, "data")
	for path, b := range map[string][]byte{meta: buf.Bytes(), data: content} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return meta, data, content
}

func mkdir(t testing.TB, elem ...string) string {
	t.Helper()
	dir := filepath.Join(elem...)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestMount(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		o    Options
		kind Kind
	}{
		"file": {Options{}, File},
		"loop": {Options{Loop: true}, Loop},
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			meta, data, content := image(t, base)
			dir := mkdir(t, base, "dir")
			t.Cleanup(func() { _ = Detach(dir) })
			kind, err := Mount(meta, data, dir, c.o)
			if err != nil {
				t.Fatal(err)
			}
			if old := kind == Loop && before612(); kind != c.kind && !old {
				t.Errorf("mounted as %v, want %v", kind, c.kind)
			}
			if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(got, content) {
				t.Errorf("content: %v, or other bytes", err)
			}
			if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
				t.Errorf("write: %v, want EROFS", err)
			}
			found, err := List(base)
			if err != nil || len(found) != 1 || found[0] != (Info{Dir: dir, Type: "erofs", Source: meta, Major: found[0].Major, Minor: found[0].Minor, Kind: kind}) {
				t.Errorf("List: %+v, %v", found, err)
			}
			var st unix.Stat_t
			if err := unix.Stat(dir, &st); err != nil || st.Dev != unix.Mkdev(uint32(found[0].Major), uint32(found[0].Minor)) {
				t.Errorf("device %d:%d, want %x (%v)", found[0].Major, found[0].Minor, st.Dev, err)
			}
			overlay(t, base, dir, kind)

			// In use, then not.
			f, err := os.Open(filepath.Join(dir, "file"))
			if err != nil {
				t.Fatal(err)
			}
			if err := Unmount(dir); !errors.Is(err, ErrBusy) {
				t.Errorf("unmount of a busy mount: %v", err)
			}
			if err := Detach(dir); err != nil {
				t.Errorf("detach: %v", err)
			}
			if n, err := f.ReadAt(make([]byte, 10), 5); n != 10 || err != nil {
				t.Errorf("read after detach: %d, %v", n, err)
			}
			_ = f.Close()
			for range 2 { // nothing there is no error
				if err := Unmount(dir); err != nil {
					t.Errorf("unmount: %v", err)
				}
			}
			if found, err := List(base); err != nil || len(found) != 0 {
				t.Errorf("List afterwards: %+v, %v", found, err)
			}
			if used := loops(t, base); used != nil {
				t.Errorf("loop devices stay: %v", used)
			}
		})
	}
}

func before612() bool {
	var major, minor int
	r := strings.Split(release(), ".")
	for i, p := range []*int{&major, &minor} {
		for _, c := range r[i] {
			*p = *p*10 + int(c-'0')
		}
	}
	return major < 6 || major == 6 && minor < 12
}

// overlay checks that a mount serves as a layer: whiteouts work, and set-uid
// bits are not masked by the mount's flags.
func overlay(t *testing.T, base, dir string, kind Kind) {
	t.Helper()
	below, merged := mkdir(t, base, fmt.Sprint("below-", kind)), mkdir(t, base, fmt.Sprint("merged-", kind))
	for _, name := range []string{"gone", "kept"} {
		if err := os.WriteFile(filepath.Join(below, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+dir+":"+below); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(merged, 0); err != nil {
			t.Error(err)
		}
	}()
	if _, err := os.Lstat(filepath.Join(merged, "gone")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("whiteout does not hide: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(merged, "kept")); err != nil || string(b) != "kept" {
		t.Errorf("lower file: %q, %v", b, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Flags&(unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC) != 0 || fs.Flags&unix.ST_RDONLY == 0 {
		t.Errorf("mount flags %#x", fs.Flags)
	}
}

// loops returns the loop devices over files below dir.
func loops(t *testing.T, dir string) (used []string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), dir) {
			used = append(used, f)
		}
	}
	return used
}

func TestMountErrors(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	meta, data, _ := image(t, base)
	dir := mkdir(t, base, "dir")
	bad := filepath.Join(base, "bad")
	if err := os.WriteFile(bad, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		meta, data, dir string
		loop            bool
		want            error
	}{
		"comma":           {meta, data + ",rw", dir, false, nil},
		"no data":         {meta, data + "x", dir, false, unix.ENOENT},
		"no data, loop":   {meta, data + "x", dir, true, unix.ENOENT},
		"no dir":          {meta, data, dir + "x", false, unix.ENOENT},
		"no dir, loop":    {meta, data, dir + "x", true, unix.ENOENT},
		"no image":        {bad, data, dir, false, unix.EINVAL},
		"no image, loop":  {bad, data, dir, true, unix.EINVAL},
		"data is no file": {meta, base, dir, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Mount(c.meta, c.data, c.dir, Options{Loop: c.loop})
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("error is %v, want %v", err, c.want)
				_ = Detach(c.dir)
			}
		})
	}
	if used := loops(t, base); used != nil {
		t.Errorf("loop devices stay: %v", used)
	}
}

// TestExplain: what the kernel lacks is said, and can be told apart.
func TestExplain(t *testing.T) {
	for _, c := range []struct {
		cause       error
		text        string
		unsupported bool
	}{
		{unix.ENODEV, "modprobe erofs", true},
		{errNoLoop, "modprobe loop", true},
		{unix.EPERM, "operation not permitted", false},
	} {
		err := explain(c.cause, "meta", "dir")
		if !errors.Is(err, c.cause) || errors.Is(err, blockdev.ErrUnsupported) != c.unsupported || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%v becomes %v", c.cause, err)
		}
		if c.unsupported && (!strings.Contains(err.Error(), "6.12") || !strings.Contains(err.Error(), "6.4")) {
			t.Errorf("%v does not say which kernels do", err)
		}
	}
}

func TestTooOld(t *testing.T) {
	for release, want := range map[string]bool{
		"5.15.0-91-generic": true, "6.1.0-18-amd64": true, "6.3.13": true,
		"6.4.0": false, "6.12.6+bpo-amd64": false, "7.0.1": false, "10.1": false, "": false, "custom": false,
	} {
		if got := tooOld(release); got != want {
			t.Errorf("%q: %t, want %t", release, got, want)
		}
	}
}

// TestDead: a FUSE mount that nobody serves is listed, and can be cleared away.
func TestDead(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	dir := mkdir(t, base, "fuse")
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip("needs FUSE: ", err)
	}
	opts := "fd=" + strconv.Itoa(fd) + ",rootmode=40000,user_id=0,group_id=0"
	if err := unix.Mount("test", dir, "fuse.test", 0, opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Detach(dir) })
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
		t.Errorf("not dead: %v", err)
	}
	// The path of a dead mount, and one through a symbolic link.
	link := filepath.Join(base, "link")
	if err := os.Symlink(base, link); err != nil {
		t.Fatal(err)
	}
	for _, under := range []string{dir, base, link} {
		if found, err := List(under); err != nil || len(found) != 1 || found[0].Dir != dir || found[0].Type != "fuse.test" || found[0].Kind != 0 {
			t.Errorf("List(%s): %+v, %v", under, found, err)
		}
	}
	if err := MkdirMountpoint(dir); err != nil {
		t.Errorf("dead mount point as a directory to mount on: %v", err)
	}
	if err := Unmount(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("still dead: %v", err)
	}
}
