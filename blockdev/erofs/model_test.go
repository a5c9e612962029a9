package erofs

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
)

// entry is what one name of a mounted image shows.
type entry struct {
	Mode, UID, GID uint32
	Sec            int64
	Nsec           uint32
	Size           int64 // not of directories
	Nlink          uint32
	Rdev           uint32
	Target         string
	Xattrs         string
	Names          string // of a hard link: all its names
	in             *Inode
}

func (e entry) String() string {
	return fmt.Sprintf("mode %#o owner %d:%d mtime %d.%09d size %d nlink %d rdev %#x target %q xattrs %.300s names %.200s",
		e.Mode, e.UID, e.GID, e.Sec, e.Nsec, e.Size, e.Nlink, e.Rdev, e.Target, e.Xattrs, e.Names)
}

func xattrString(m map[string]string) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintf(&b, "%s=%q ", k, m[k])
	}
	return b.String()
}

// expected lists what a reader of the tree below root must show, by path.
func expected(root *Inode) map[string]entry {
	out := make(map[string]entry)
	names := make(map[*Inode][]string)
	var walk func(p string, in *Inode)
	walk = func(p string, in *Inode) {
		e := entry{Mode: in.Mode, UID: in.UID, GID: in.GID, Sec: in.MtimeSec, Nsec: in.MtimeNsec, in: in}
		names[in] = append(names[in], p)
		xs := make(map[string]string)
		for _, x := range in.Xattrs {
			xs[x.Name] = string(x.Value)
		}
		e.Xattrs = xattrString(xs)
		switch in.Mode & modeType {
		case modeDir:
			e.Nlink = 2
			for _, c := range in.Children {
				if c.Inode.Mode&modeType == modeDir {
					e.Nlink++
				}
				walk(path.Join(p, c.Name), c.Inode)
			}
		case modeRegular:
			e.Size = in.Size
		case modeSymlink:
			e.Size, e.Target = int64(len(in.Inline)), string(in.Inline)
		case modeChar, modeBlock:
			e.Rdev = in.Rdev
		}
		out[p] = e
	}
	walk("/", root)
	for in, ps := range names {
		if in.Mode&modeType == modeDir {
			continue
		}
		slices.Sort(ps)
		for _, p := range ps {
			e := out[p]
			e.Nlink = uint32(len(ps))
			if len(ps) > 1 {
				e.Names = strings.Join(ps, " ")
			}
			out[p] = e
		}
	}
	return out
}

// compare reports what differs, entry by entry.
func compare(t *testing.T, want, got map[string]entry) {
	t.Helper()
	bad := 0
	for _, p := range slices.Sorted(maps.Keys(want)) {
		g, ok := got[p]
		w := want[p]
		w.in, g.in = nil, nil
		if ok && w == g {
			continue
		}
		if bad++; bad > 10 {
			t.Fatal("and more")
		}
		if !ok {
			t.Errorf("%.300q is missing", p)
		} else {
			t.Errorf("%.300q:\nwant %v\n got %v", p, w, g)
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			t.Errorf("%.300q should not be there", p)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d entries, want %d", len(got), len(want))
	}
}

// contentAt is what p bytes at off of the file read as.
func contentAt(t *testing.T, in *Inode, diff io.ReaderAt, p []byte, off int64) {
	t.Helper()
	clear(p)
	if len(in.Inline) > 0 {
		copy(p, in.Inline[off:])
		return
	}
	for _, e := range in.Extents {
		from, to := max(off, e.Offset), min(off+int64(len(p)), e.Offset+e.Length)
		if from < to {
			if _, err := diff.ReadAt(p[from-off:to-off], e.DiffOffset+from-e.Offset); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// compareContent reads all of a small file; of a large one 64 KiB around every
// edge of an extent (up to 40 of them) and at random places.
func compareContent(t *testing.T, name string, in *Inode, diff, got io.ReaderAt) {
	t.Helper()
	var at []int64
	const window = 64 << 10
	if in.Size <= 1<<20 {
		for off := int64(0); off < in.Size; off += window {
			at = append(at, off)
		}
	} else {
		at = append(at, 0, in.Size-window)
		for i := 0; i < len(in.Extents); i += len(in.Extents)/20 + 1 {
			at = append(at, in.Extents[i].Offset-window/2, in.Extents[i].Offset+in.Extents[i].Length-window/2)
		}
		rnd := rand.New(rand.NewPCG(1, 2))
		for range 20 {
			at = append(at, rnd.Int64N(in.Size))
		}
	}
	want, have := make([]byte, window), make([]byte, window)
	for _, off := range at {
		off = max(off, 0)
		n := min(window, in.Size-off)
		contentAt(t, in, diff, want[:n], off)
		if m, err := got.ReadAt(have[:n], off); int64(m) != n {
			t.Fatalf("%s: %d of %d bytes at %d: %v", name, m, n, off, err)
		}
		if !bytes.Equal(want[:n], have[:n]) {
			i := 0
			for want[i] == have[i] {
				i++
			}
			t.Fatalf("%s: content differs from byte %d on (size %d, %d extents)", name, off+int64(i), in.Size, len(in.Extents))
		}
	}
}

func emit(t testing.TB, root *Inode, diffSize int64) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, root, diffSize); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func dirOf(children ...Dirent) *Inode {
	return &Inode{Mode: modeDir | 0o755, Children: children}
}
