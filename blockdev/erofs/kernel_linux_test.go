package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// mountImage mounts meta over the file diff and returns where.
func mountImage(t *testing.T, meta []byte, diff string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if known, _ := os.ReadFile("/proc/filesystems"); !bytes.Contains(known, []byte("\terofs\n")) {
		t.Skip("this kernel has no EROFS (or has it as a module that is not loaded)")
	}
	file := filepath.Join(t.TempDir(), "meta.erofs")
	if err := os.WriteFile(file, meta, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "m")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	err := unix.Mount(file, dir, "erofs", unix.MS_RDONLY, "device="+diff)
	if errors.Is(err, unix.ENOTBLK) {
		t.Skip("this kernel does not mount EROFS from files (Linux 6.12 does)")
	}
	if err != nil {
		t.Fatalf("the kernel refuses the image: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

func writeDiff(t *testing.T, data []byte, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "diff"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// kernelXattrs takes a buffer of 128 KiB to work in.
func kernelXattrs(t *testing.T, p string, buf []byte) map[string]string {
	t.Helper()
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		t.Fatalf("listxattr %s: %v", p, err)
	}
	m := make(map[string]string)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(p, name, buf)
		if err != nil {
			t.Fatalf("getxattr %s %s: %v", p, name, err)
		}
		if _, ok := m[name]; ok {
			t.Errorf("%s lists %s twice", p, name)
		}
		m[name] = string(buf[:n])
	}
	return m
}

// kernelTree reads everything but content through system calls. Every name is
// looked up by itself as well, and a few that are not there.
func kernelTree(t *testing.T, dir string) map[string]entry {
	t.Helper()
	out := make(map[string]entry)
	byIno := make(map[uint64][]string)
	buf := make([]byte, 128<<10)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return fmt.Errorf("lstat %.100q: %w", p, err)
		}
		if d.Type() != syscallType(st.Mode) {
			t.Errorf("%.100q: readdir says %v, lstat %#o", p, d.Type(), st.Mode)
		}
		e := entry{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec),
			Nlink: uint32(st.Nlink), Xattrs: xattrString(kernelXattrs(t, p, buf))}
		switch st.Mode & modeType {
		case modeChar, modeBlock:
			// st_rdev has 12 bits of major and 20 of minor here.
			maj, min := unix.Major(st.Rdev), unix.Minor(st.Rdev)
			e.Rdev = min&0xff | maj<<8 | (min&^0xff)<<12
		case modeSymlink:
			if e.Target, err = os.Readlink(p); err != nil {
				return err
			}
			e.Size = st.Size
		case modeRegular:
			e.Size = st.Size
		}
		name := "/" + strings.TrimPrefix(strings.TrimPrefix(p, dir), "/")
		out[name] = e
		if !d.IsDir() {
			byIno[st.Ino] = append(byIno[st.Ino], name)
		} else if err := unix.Lstat(p+"/not there", &st); !errors.Is(err, unix.ENOENT) {
			t.Errorf("%.100q has an entry %q: %v", p, "not there", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, ps := range byIno {
		if len(ps) > 1 {
			slices.Sort(ps)
			for _, p := range ps {
				e := out[p]
				e.Names = strings.Join(ps, " ")
				out[p] = e
			}
		}
	}
	return out
}

func syscallType(mode uint32) fs.FileMode {
	switch mode & modeType {
	case syscall.S_IFDIR:
		return fs.ModeDir
	case syscall.S_IFLNK:
		return fs.ModeSymlink
	case syscall.S_IFCHR:
		return fs.ModeDevice | fs.ModeCharDevice
	case syscall.S_IFBLK:
		return fs.ModeDevice
	case syscall.S_IFIFO:
		return fs.ModeNamedPipe
	case syscall.S_IFSOCK:
		return fs.ModeSocket
	}
	return 0
}

func checkKernel(t *testing.T, root *Inode, diff *os.File, diffSize int64) {
	t.Helper()
	dir := mountImage(t, emit(t, root, diffSize), diff.Name())
	want := expected(root)
	compare(t, want, kernelTree(t, dir))
	for _, p := range slices.Sorted(maps.Keys(want)) {
		e := want[p]
		if e.Mode&modeType != modeRegular || e.Size == 0 {
			continue
		}
		f, err := os.Open(filepath.Join(dir, p))
		if err != nil {
			t.Fatal(err)
		}
		compareContent(t, p, e.in, diff, f)
		f.Close()
		if t.Failed() {
			return
		}
	}
}

func TestKernelAwkward(t *testing.T) {
	data := randomDiff(1, 1<<20)
	checkKernel(t, awkwardTree(blockSize), writeDiff(t, data, int64(len(data))), int64(len(data)))
}

func TestKernelRandom(t *testing.T) {
	data := randomDiff(2, 1<<20)
	diff := writeDiff(t, data, int64(len(data)))
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			checkKernel(t, randomTree(seed, 400, int64(len(data)), blockSize), diff, int64(len(data)))
		})
	}
}

// TestKernelEmpty is a layer without an entry: a diff of no bytes.
func TestKernelEmpty(t *testing.T) {
	checkKernel(t, dirOf(), writeDiff(t, nil, 0), 0)
}

func TestKernelLargeDirectory(t *testing.T) {
	root := dirOf()
	for i := range 100_000 {
		root.Children = append(root.Children, Dirent{fmt.Sprintf("entry-%d", i*7919%100_000), &Inode{Mode: modeRegular | 0o644, UID: uint32(i)}})
	}
	checkKernel(t, root, writeDiff(t, nil, 0), 0)
}

// TestKernelSparse has holes that only chunks of 4 KiB can tell from data, in 20
// GiB: a chunk map of 40 MiB.
func TestKernelSparse(t *testing.T) {
	data := randomDiff(7, 1<<20)
	f := &Inode{Mode: modeRegular | 0o644, Size: 20<<30 + 77}
	for i := range int64(200) {
		f.Extents = append(f.Extents, Extent{i * 100 << 20, i * 4096, 4096 * (1 + i%5)})
	}
	f.Extents = append(f.Extents, Extent{20 << 30, 512, 77})
	checkKernel(t, dirOf(Dirent{"sparse", f}), writeDiff(t, data, int64(len(data))), int64(len(data)))
}

// TestKernelLargeDiff reads from both ends of the largest diff that blocks of
// 512 bytes can address, and one file that is nearly all of it.
func TestKernelLargeDiff(t *testing.T) {
	const last = MaxDiffSize - blockSize
	diff := writeDiff(t, randomDiff(3, 1<<16), MaxDiffSize)
	if _, err := diff.WriteAt(randomDiff(4, blockSize), last); err != nil {
		t.Fatal(err)
	}
	root := dirOf(
		Dirent{"first", &Inode{Mode: modeRegular, Size: 4096, Extents: []Extent{{0, 0, 4096}}}},
		Dirent{"last", &Inode{Mode: modeRegular, Size: 500, Extents: []Extent{{0, last, 500}}}},
		Dirent{"all", &Inode{Mode: modeRegular, Size: MaxDiffSize, Extents: []Extent{{0, 0, MaxDiffSize}}}},
		Dirent{"most", &Inode{Mode: modeRegular, Size: 1<<40 + 5, Extents: []Extent{{0, MaxDiffSize - 1<<40 - blockSize, 1<<40 + 5}}}},
	)
	checkKernel(t, root, diff, MaxDiffSize)
}

// TestKernelChecksum: the kernel checks the superblock's checksum, so a flipped
// bit in it must be refused; otherwise the mounts above would prove nothing of it.
func TestKernelChecksum(t *testing.T) {
	meta := emit(t, dirOf(), 0)
	diff := writeDiff(t, nil, 0)
	mountImage(t, meta, diff.Name()) // skips where nothing can be mounted
	meta[superOffset+64] ^= 1
	file := filepath.Join(t.TempDir(), "meta")
	if err := os.WriteFile(file, meta, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := unix.Mount(file, dir, "erofs", unix.MS_RDONLY, "device="+diff.Name()); err == nil {
		_ = unix.Unmount(dir, 0)
		t.Fatal("the kernel mounts an image with a wrong checksum")
	}
}
