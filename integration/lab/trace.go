package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Read is one read of a file in an image, as the kernel sent it to the layer's
// file system: what was not in the page cache.
type Read struct {
	Path   string // in the image
	Offset int64  // bytes
	Length int64  // bytes
}

// Recording is the reads of a start, in order.
type Recording []Read

// Bytes is how much was read.
func (r Recording) Bytes() int64 {
	var n int64
	for _, x := range r {
		n += x.Length
	}
	return n
}

// Replay reads the same ranges through an image mounted at dir, each after the
// one before, and nothing beside them. The pages must not be cached already.
func (r Recording) Replay(ctx context.Context, dir string) error {
	files := map[string]*os.File{}
	defer func() {
		for _, f := range files {
			_ = f.Close() // read only
		}
	}()
	// Many replays at once have more files than a process may open.
	last := make(map[string]int, len(r))
	for i, x := range r {
		last[x.Path] = i
	}
	var buf []byte
	for i, x := range r {
		if err := ctx.Err(); err != nil {
			return err
		}
		f := files[x.Path]
		if f == nil {
			var err error
			if f, err = os.Open(filepath.Join(dir, x.Path)); err != nil {
				return err
			}
			// What the kernel read ahead is in the recording already.
			if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
				return err
			}
			files[x.Path] = f
		}
		if int64(cap(buf)) < x.Length {
			buf = make([]byte, x.Length)
		}
		if _, err := f.ReadAt(buf[:x.Length], x.Offset); err != nil {
			return fmt.Errorf("read %d bytes at %d of %s: %w", x.Length, x.Offset, x.Path, err)
		}
		if last[x.Path] == i {
			delete(files, x.Path)
			_ = f.Close() // read only
		}
	}
	return nil
}

const tracefs = "/sys/kernel/tracing"

// Record returns the reads that reach the node's lazily or natively mounted
// layers while f runs. The page cache should be empty before.
func (n *Node) Record(f func() error) (_ Recording, err error) {
	if err := unix.Mount("tracefs", tracefs, "tracefs", 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("mount %s: %w (a start is recorded by the kernel's erofs trace events)", tracefs, err)
	}
	dir := filepath.Join(tracefs, "instances", filepath.Base(n.lab.Dir))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	for file, value := range map[string]string{
		"buffer_size_kb":                       "16384",
		"events/erofs/erofs_readahead/enable":  "1",
		"events/erofs/erofs_read_folio/enable": "1",
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0o600); err != nil {
			return nil, err
		}
	}
	if err := f(); err != nil {
		return nil, err
	}
	trace, err := os.ReadFile(filepath.Join(dir, "trace"))
	if err != nil {
		return nil, err
	}
	return n.parseTrace(string(trace))
}

// The events' printed forms: include/trace/events/erofs.h in Linux.
var (
	readAhead = regexp.MustCompile(`erofs_readahead: dev = \((\d+),(\d+)\), nid = (\d+), start = (\d+) nrpage = (\d+) raw`)
	readFolio = regexp.MustCompile(`erofs_read_folio: dev = \((\d+),(\d+)\), nid = (\d+), FILE, index = (\d+), `)
)

type inode struct {
	dev string // major:minor
	nid uint64
}

func (n *Node) parseTrace(trace string) (Recording, error) {
	files, err := n.layerFiles()
	if err != nil {
		return nil, err
	}
	var r Recording
	for line := range strings.Lines(trace) {
		m, pages := readAhead.FindStringSubmatch(line), int64(1)
		if m != nil {
			pages, _ = strconv.ParseInt(m[5], 10, 64) // digits, by the expression
		} else if m = readFolio.FindStringSubmatch(line); m == nil {
			continue
		}
		nid, err := strconv.ParseUint(m[3], 10, 64)
		if err != nil {
			return nil, err
		}
		start, err := strconv.ParseInt(m[4], 10, 64)
		if err != nil {
			return nil, err
		}
		file, ok := files[inode{m[1] + ":" + m[2], nid}]
		if !ok {
			continue // metadata, or another machine's mount
		}
		const page = 4096
		if x := (Read{file.path, start * page, min(pages*page, file.size-start*page)}); x.Length > 0 {
			r = append(r, x)
		}
	}
	if len(r) == 0 {
		return nil, errors.New("no read of a layer was recorded: was everything in the page cache?")
	}
	return r, nil
}

type layerFile struct {
	path string
	size int64
}

// layerFiles finds the regular files in all layers that the node has mounted.
func (n *Node) layerFiles() (map[inode]layerFile, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.Root))
	if err != nil {
		return nil, err
	}
	files := map[inode]layerFile{}
	for _, m := range mounts {
		if m.FSType != "erofs" {
			continue
		}
		dev := fmt.Sprintf("%d:%d", m.Major, m.Minor)
		err := filepath.WalkDir(m.Mountpoint, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			st, err := d.Info()
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(m.Mountpoint, path)
			files[inode{dev, st.Sys().(*syscall.Stat_t).Ino}] = layerFile{rel, st.Size()}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return files, nil
}
