package erofs

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
)

// maxSequential bounds what is read through go-erofs: its files cannot seek.
const maxSequential = 16 << 20

// seqReader gives a file that can only be read in order a ReadAt.
type seqReader struct {
	open func() io.ReadCloser
}

func (s seqReader) ReadAt(p []byte, off int64) (int, error) {
	f := s.open()
	defer f.Close()
	if _, err := io.CopyN(io.Discard, f, off); err != nil {
		return 0, err
	}
	return io.ReadFull(f, p)
}

func checkGoErofs(t *testing.T, root *Inode, data []byte) {
	t.Helper()
	img, err := goerofs.Open(bytes.NewReader(emit(t, root, int64(len(data)))), goerofs.WithExtraDevices(bytes.NewReader(data)))
	if err != nil {
		t.Fatal(err)
	}
	want := expected(root)
	got := make(map[string]entry)
	byIno := make(map[int64][]string)
	var walk func(p string)
	walk = func(p string) {
		rel := strings.TrimPrefix(p, "/")
		if rel == "" {
			rel = "."
		}
		info, err := fs.Lstat(img, rel)
		if err != nil {
			t.Fatalf("lstat %.100q: %v", p, err)
		}
		st := info.Sys().(*goerofs.Stat)
		w := want[p]
		e := entry{Mode: unixMode(st.Mode), UID: st.UID, GID: st.GID, Sec: int64(st.Mtime), Nsec: st.MtimeNs,
			Nlink: uint32(st.Nlink)}
		xs := make(map[string]string)
		for k, v := range st.Xattrs {
			// It shows ACLs as "system.posix_acl_access.".
			xs[strings.TrimSuffix(k, ".")] = v
		}
		e.Xattrs = xattrString(xs)
		switch e.Mode & modeType {
		case modeDir:
			list, err := fs.ReadDir(img, rel)
			if err != nil {
				t.Fatalf("readdir %.100q: %v", p, err)
			}
			for _, d := range list {
				walk(path.Join(p, d.Name()))
			}
		case modeSymlink:
			e.Size = info.Size()
			if e.Target, err = fs.ReadLink(img, rel); err != nil {
				t.Fatalf("readlink %.100q: %v", p, err)
			}
		case modeChar, modeBlock:
			e.Rdev = st.Rdev
		case modeRegular:
			e.Size = info.Size()
			if w.in != nil && e.Size <= maxSequential {
				compareContent(t, p, w.in, bytes.NewReader(data), seqReader{func() io.ReadCloser {
					f, err := img.Open(rel)
					if err != nil {
						t.Fatal(err)
					}
					return f
				}})
			}
		}
		if e.Mode&modeType != modeDir {
			byIno[st.Ino] = append(byIno[st.Ino], p)
		}
		got[p] = e
	}
	walk("/")
	for _, p := range slices.Sorted(maps.Keys(got)) {
		for _, ps := range byIno {
			if len(ps) > 1 && slices.Contains(ps, p) {
				slices.Sort(ps)
				e := got[p]
				e.Names = strings.Join(ps, " ")
				got[p] = e
			}
		}
	}
	compare(t, want, got)
}

func unixMode(m fs.FileMode) uint32 {
	u := uint32(m.Perm())
	for _, b := range []struct {
		m fs.FileMode
		u uint32
	}{{fs.ModeSetuid, 0o4000}, {fs.ModeSetgid, 0o2000}, {fs.ModeSticky, 0o1000}} {
		if m&b.m != 0 {
			u |= b.u
		}
	}
	switch {
	case m&fs.ModeDir != 0:
		return u | modeDir
	case m&fs.ModeSymlink != 0:
		return u | modeSymlink
	case m&fs.ModeCharDevice != 0:
		return u | modeChar
	case m&fs.ModeDevice != 0:
		return u | modeBlock
	case m&fs.ModeNamedPipe != 0:
		return u | modeFIFO
	case m&fs.ModeSocket != 0:
		return u | modeSocket
	}
	return u | modeRegular
}

func TestGoErofsRandom(t *testing.T) {
	data := randomDiff(5, 1<<20)
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			checkGoErofs(t, randomTree(100+seed, 300, int64(len(data)), blockSize), data)
		})
	}
}

func TestGoErofsAwkward(t *testing.T) {
	checkGoErofs(t, awkwardTree(blockSize), randomDiff(6, 1<<20))
}
