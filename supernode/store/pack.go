package store

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/durable"
)

// maxOpenPacks bounds the file descriptors that idle packs keep.
const maxOpenPacks = 256

// packs opens, reads, punches and deletes pack files.
type packs struct {
	dir string
	log *slog.Logger

	mu      sync.Mutex
	open    map[uint64]*packFile
	punched []extent // since the last change, which takes them out of bucket dead
}

// packFile is an open pack; users counts the callers that read from or write to it.
type packFile struct {
	f     *os.File
	users int
	gone  bool // no longer in packs.open: the last user closes it
}

func newPacks(dir string, log *slog.Logger) (*packs, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return &packs{dir: dir, log: log, open: make(map[uint64]*packFile)}, nil
}

func (p *packs) path(id uint64) string {
	return filepath.Join(p.dir, fmt.Sprintf("%016x", id))
}

// list returns the ids of all pack files and deletes what is none.
func (p *packs) list() ([]uint64, error) {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	var ids []uint64
	for _, e := range entries {
		id, err := strconv.ParseUint(e.Name(), 16, 64)
		if err != nil || len(e.Name()) != 16 {
			if err := os.RemoveAll(filepath.Join(p.dir, e.Name())); err != nil {
				return nil, fmt.Errorf("store: %w", err)
			}
			continue
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// create makes a new pack and leaves it acquired once.
func (p *packs) create(id uint64) (*packFile, error) {
	f, err := os.OpenFile(p.path(id), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, diskError("create pack", err)
	}
	pf := &packFile{f: f, users: 1}
	p.mu.Lock()
	p.open[id] = pf
	p.mu.Unlock()
	return pf, nil
}

// writeback has the disk begin with a range that was written, and does not wait for
// it: otherwise all of a pack is written when it is synced, and somebody waits.
func (pf *packFile) writeback(off, n int64) {
	conn, err := pf.f.SyscallConn()
	if err != nil {
		return // closed
	}
	// Advice: sync finds out what has failed.
	_ = conn.Control(func(fd uintptr) { _ = unix.SyncFileRange(int(fd), off, n, unix.SYNC_FILE_RANGE_WRITE) })
}

// acquire opens a pack. The caller releases it.
func (p *packs) acquire(id uint64) (*packFile, error) {
	p.mu.Lock()
	if pf, ok := p.open[id]; ok {
		pf.users++
		p.mu.Unlock()
		return pf, nil
	}
	p.mu.Unlock()
	f, err := os.OpenFile(p.path(id), os.O_RDWR, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("pack %016x is missing: %w", id, blockdev.ErrCorrupt)
		}
		return nil, diskError("open pack", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if pf, ok := p.open[id]; ok { // somebody was faster
		f.Close()
		pf.users++
		return pf, nil
	}
	pf := &packFile{f: f, users: 1}
	p.open[id] = pf
	if len(p.open) > maxOpenPacks {
		p.closeIdleLocked()
	}
	return pf, nil
}

// closeIdleLocked closes some pack that nobody uses; map order picks it.
func (p *packs) closeIdleLocked() {
	for id, pf := range p.open {
		if pf.users == 0 {
			delete(p.open, id)
			pf.f.Close()
			return
		}
	}
}

func (p *packs) release(pf *packFile) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pf.users--
	if pf.gone && pf.users == 0 {
		pf.f.Close()
	}
}

// read returns the bytes of e, appended to buf, after checking them.
func (p *packs) read(e extent, buf []byte) ([]byte, error) {
	pf, err := p.acquire(e.Pack)
	if err != nil {
		return nil, err
	}
	defer p.release(pf)
	n := len(buf)
	buf = append(buf, make([]byte, e.Length)...)
	if _, err := pf.f.ReadAt(buf[n:], e.Offset); err != nil {
		// Short files and EIO alike: the bytes cannot be read.
		return nil, fmt.Errorf("pack %016x offset %d: %w: %w", e.Pack, e.Offset, blockdev.ErrCorrupt, err)
	}
	if checksum(buf[n:]) != e.CRC {
		return nil, fmt.Errorf("pack %016x offset %d: checksum differs: %w", e.Pack, e.Offset, blockdev.ErrCorrupt)
	}
	return buf, nil
}

// readList reads a reference list.
func (p *packs) readList(e extent) ([]blockdev.Digest, error) {
	b, err := p.read(e, nil)
	if err != nil {
		return nil, err
	}
	refs := make([]blockdev.Digest, len(b)/len(blockdev.Digest{}))
	for i := range refs {
		copy(refs[i][:], b[i*len(refs[i]):])
	}
	return refs, nil
}

// punch gives the blocks of a range back to the file system.
func (p *packs) punch(id uint64, off, n int64) error {
	pf, err := p.acquire(id)
	if err != nil {
		return err
	}
	defer p.release(pf)
	return punchHole(pf.f, off, n)
}

// punchAll frees ranges and notes them as freed. What fails is tried again at
// the next Open.
func (p *packs) punchAll(dead []extent64) {
	var done []extent
	for _, e := range dead {
		// A pack that is gone has nothing to free.
		if err := p.punch(e.pack, e.offset, e.length); err != nil && !errors.Is(err, blockdev.ErrCorrupt) {
			p.log.Warn("store: cannot free disk space; the next start tries again", "error", err)
			continue
		}
		done = append(done, extent{Pack: e.pack, Offset: e.offset})
	}
	p.note(done)
}

// note has the next change take ranges that were freed out of bucket dead.
func (p *packs) note(punched []extent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.punched = append(p.punched, punched...)
}

// noted are the ranges to be taken out of bucket dead; if that fails, they are to be noted
// again.
func (p *packs) noted() []extent {
	p.mu.Lock()
	defer p.mu.Unlock()
	punched := p.punched
	p.punched = nil
	return punched
}

func punchHole(f *os.File, off, n int64) error {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err != nil {
		return fmt.Errorf("free space in %s: %w", f.Name(), err)
	}
	return nil
}

// remove deletes a pack. Readers that have it open see it to their end.
func (p *packs) remove(id uint64) error {
	p.mu.Lock()
	if pf, ok := p.open[id]; ok {
		delete(p.open, id)
		pf.gone = true
		if pf.users == 0 {
			pf.f.Close()
		}
	}
	p.mu.Unlock()
	if err := os.Remove(p.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

// diskUse returns the bytes that a pack occupies on disk.
func (p *packs) diskUse(id uint64) int64 { return fileUse(p.path(id)) }

// fileUse is 0 for a file that is not there.
func fileUse(path string) int64 {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0
	}
	return st.Blocks * 512
}

// close closes all files; the store has seen to it that nobody uses them.
func (p *packs) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var err error
	for id, pf := range p.open {
		delete(p.open, id)
		pf.gone = true
		if pf.users == 0 {
			err = errors.Join(err, pf.f.Close())
		}
	}
	return err
}

// canPunch tells whether the file system under dir can free ranges of a file.
// The quota cannot hold on one that does not.
func canPunch(dir string) error {
	f, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return diskError("write to "+dir, err)
	}
	defer f.Close()
	// Without its name it is gone with its descriptor, whatever happens.
	if err := os.Remove(f.Name()); err != nil {
		return diskError("delete in "+dir, err)
	}
	if _, err := f.Write(make([]byte, 8192)); err != nil {
		return diskError("write to "+dir, err)
	}
	if err := punchHole(f, 0, 4096); err != nil {
		return fmt.Errorf("the file system of %s cannot free parts of a file (ext4, xfs, btrfs, zfs and tmpfs can): %w", dir, err)
	}
	return nil
}

// sync makes the names of packs durable.
func (p *packs) sync() error {
	if err := durable.SyncDir(p.dir); err != nil {
		return diskError("sync "+p.dir, err)
	}
	return nil
}

// diskError wraps err, as ErrNoSpace where the disk is full.
func diskError(doing string, err error) error {
	if isFull(err) {
		return fmt.Errorf("store: %s: %w: %w", doing, blockdev.ErrNoSpace, err)
	}
	return fmt.Errorf("store: %s: %w", doing, err)
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
