package fusefs

import (
	"context"
	"encoding/binary"
	"log/slog"
	"math"
	"os"
	"slices"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/shoalfs/shoal/blockdev"
)

// File is one masked diff.
type File interface {
	// Size is the length of the masked diff in bytes. It never changes.
	Size() int64
	// Read reads as io.ReaderAt does, n bytes into memory that it takes from m: once,
	// and when all bytes are at hand. It fetches what is not local, and ends soon
	// after ctx.
	Read(ctx context.Context, off int64, n int, m blockdev.Memory) (int, error)
	// Local returns the file that has all n bytes at off, at the same offset, if they are
	// all here and nothing can change them or take them away: they are on stable storage.
	// After Size, up to the next multiple of 4096 bytes, the file reads as zeros. The file
	// is not closed while it may be in use.
	Local(off int64, n int) (*os.File, bool)
	// ReadLocal fills p from off on if all bytes are here, on stable storage or not, and
	// reports whether it has. It does not wait for bytes that are missing. After Size it
	// reads zeros, as Local's file.
	ReadLocal(p []byte, off int64) bool
}

// Files is the directory. Its methods are called for every request, from several
// goroutines, and must not wait for the mount.
type Files interface {
	// Open returns the file of a diff, or false if there is none.
	Open(id blockdev.Digest) (File, bool)
	// List returns all diffs that Open knows, in any order.
	List() []blockdev.Digest
}

// pageSize is what file lengths are rounded up to, so that a loop device over a
// file has no short last sector.
const pageSize = 4096

func fileLength(size int64) int64 { return (size + pageSize - 1) &^ (pageSize - 1) }

// nodeID and handle name a diff to the kernel.
func nodeID(id blockdev.Digest) uint64 { return binary.BigEndian.Uint64(id[0:8]) }
func handle(id blockdev.Digest) uint64 { return binary.BigEndian.Uint64(id[8:16]) }

// usable says whether a diff can be a file: 0 is no node, 1 the root, and the
// highest id is taken by go-fuse.
func usable(id blockdev.Digest) bool {
	n := nodeID(id)
	return n > fuse.FUSE_ROOT_ID && n != math.MaxUint64
}

// nodes finds the diff of a node id. It remembers only what Files can tell
// again, so a new process knows the nodes of an old kernel.
type nodes struct {
	files Files
	mu    sync.RWMutex
	ids   map[uint64]blockdev.Digest
}

// byNode returns the diff of a node id that the kernel has been told.
func (n *nodes) byNode(node uint64) (blockdev.Digest, File, bool) {
	n.mu.RLock()
	id, known := n.ids[node]
	n.mu.RUnlock()
	if known {
		if f, ok := n.files.Open(id); ok {
			return id, f, true
		}
		// Removed; another diff with the same 64 bits may have come since.
		n.mu.Lock()
		delete(n.ids, node)
		n.mu.Unlock()
	}
	for _, id := range n.files.List() {
		if nodeID(id) == node && usable(id) {
			return n.byID(id)
		}
	}
	return blockdev.Digest{}, nil, false
}

// byID opens a diff and takes its node id. It fails if there is no such diff, or
// if another diff that still exists has the node id.
func (n *nodes) byID(id blockdev.Digest) (blockdev.Digest, File, bool) {
	f, ok := n.files.Open(id)
	if !ok || !usable(id) {
		return id, nil, false
	}
	node := nodeID(id)
	n.mu.RLock()
	old, taken := n.ids[node]
	n.mu.RUnlock()
	if taken && old == id {
		return id, f, true
	}
	if taken {
		if _, alive := n.files.Open(old); alive {
			return id, nil, false
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if now, ok := n.ids[node]; ok && now != old && now != id {
		return id, nil, false
	}
	n.ids[node] = id
	return id, f, true
}

// rawFS answers what go-fuse's ProtocolServer passes on: names and attributes.
type rawFS struct {
	fuse.RawFileSystem
	nodes *nodes
	log   *slog.Logger
}

// validSeconds is how long the kernel may believe a name: a removed diff may be seen that
// long.
//
// The attributes of a file do not change, so they are valid for attrSeconds, ten years.
// A loop device is switched from a file of this server to the file on disk also after the
// server has ended, and since Linux 6.17 LOOP_CHANGE_FD asks for the size of both: of the
// one whose server has ended the kernel must know it, or else it fails with EINVAL.
const (
	validSeconds = 1
	attrSeconds  = 10 * 365 * 24 * 3600
)

func fillAttr(id blockdev.Digest, f File, a *fuse.Attr) {
	size := uint64(fileLength(f.Size()))
	*a = fuse.Attr{Ino: nodeID(id), Size: size, Blocks: size / 512, Blksize: pageSize, Mode: syscall.S_IFREG | 0o400, Nlink: 1}
}

func rootAttr(a *fuse.Attr) {
	*a = fuse.Attr{Ino: fuse.FUSE_ROOT_ID, Blksize: pageSize, Mode: syscall.S_IFDIR | 0o500, Nlink: 2}
}

func (r *rawFS) String() string { return "shoal" }

func (r *rawFS) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if h.NodeId != fuse.FUSE_ROOT_ID {
		return fuse.Status(syscall.ENOTDIR)
	}
	id, ok := blockdev.ParseHex(name)
	if !ok {
		return fuse.ENOENT
	}
	_, f, ok := r.nodes.byID(id)
	if !ok {
		if _, exists := r.nodes.files.Open(id); exists {
			r.log.Error("cannot show a diff through FUSE: another diff has the same node ID (first 16 digits)", "diff", id)
			return fuse.EIO
		}
		return fuse.ENOENT
	}
	out.NodeId = nodeID(id)
	out.Generation = handle(id)
	out.EntryValid, out.AttrValid = validSeconds, attrSeconds
	fillAttr(id, f, &out.Attr)
	return fuse.OK
}

func (r *rawFS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.AttrValid = attrSeconds
	if in.NodeId == fuse.FUSE_ROOT_ID {
		rootAttr(&out.Attr)
		return fuse.OK
	}
	id, f, ok := r.nodes.byNode(in.NodeId)
	if !ok {
		return fuse.Status(syscall.ESTALE)
	}
	fillAttr(id, f, &out.Attr)
	return fuse.OK
}

func (r *rawFS) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return fuse.EROFS
	}
	id, _, ok := r.nodes.byNode(in.NodeId)
	if !ok {
		return fuse.Status(syscall.ESTALE)
	}
	out.Fh = handle(id)
	// No FLUSH: a process that closes a file would wait for a server.
	out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NOFLUSH
	return fuse.OK
}

func (r *rawFS) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, _ *fuse.OpenOut) fuse.Status {
	if in.NodeId != fuse.FUSE_ROOT_ID {
		return fuse.Status(syscall.ENOTDIR)
	}
	return fuse.OK
}

// ReadDir lists the diffs in the order of their names. Offsets are positions, so
// a listing that goes on while diffs come and go may miss or repeat one.
func (r *rawFS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	ids := r.nodes.files.List()
	slices.SortFunc(ids, func(a, b blockdev.Digest) int { return slices.Compare(a[:], b[:]) })
	entries := make([]fuse.DirEntry, 0, len(ids)+2)
	for _, dot := range []string{".", ".."} {
		entries = append(entries, fuse.DirEntry{Name: dot, Mode: syscall.S_IFDIR, Ino: fuse.FUSE_ROOT_ID})
	}
	for _, id := range ids {
		if usable(id) {
			entries = append(entries, fuse.DirEntry{Name: id.Hex(), Mode: syscall.S_IFREG, Ino: nodeID(id)})
		}
	}
	for i := in.Offset; i < uint64(len(entries)); i++ {
		e := entries[i]
		e.Off = i + 1
		if !out.AddDirEntry(e) {
			break
		}
	}
	return fuse.OK
}

func (r *rawFS) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.Frsize, out.NameLen = pageSize, pageSize, 255
	return fuse.OK
}
