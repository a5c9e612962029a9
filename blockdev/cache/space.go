package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
)

// use says what room is for. Each kind leaves some to those before it, so that
// prefetch does not fill the cache to the last byte, and an image that comes
// later still finds a place for its index and for what its programs read first.
type use int64

const (
	forMeta use = iota // index, metadata and bitmap, without which nothing is lazy
	forDemand
	forPrefetch
)

const (
	// maxSpare bounds what each kind of use leaves to the one before it: of the
	// quota, and of what the disk has free. Both are a sixteenth at most.
	maxSpare     = 1 << 30
	maxDiskSpare = 64 << 20
	spareShare   = 16
	// statStep is how much may be written before the file system is asked again
	// what it has free.
	statStep = 8 << 20
	// measureStep is how much may be written to one diff before its size on disk
	// is looked up, to take the place of what was reserved for it.
	measureStep = 4 << 20
	// makeRoomPause is how long Config.MakeRoom is left alone after it has found
	// nothing to remove.
	makeRoomPause = time.Second
)

// space counts what the diffs take of the disk. Before a chunk is written, room
// for the most that it can take is reserved; now and then, what the file system
// says takes the place of what was reserved. So the count is never below what is
// on disk, and a reservation that is within the quota keeps the disk within it.
type space struct {
	root  string
	quota int64 // bytes; 0: none
	block int64 // of the file system

	// disk is how many bytes may be reserved before the next statfs.
	disk atomic.Int64

	mu    sync.Mutex
	used  int64 // of all diffs
	loose int64 // the part of used that a measurement may lower
}

// taken is one diff's part, guarded by space.mu.
type taken struct {
	fixed     int64 // all files but the data, and the directory, as the file system says
	measured  int64 // the data file
	written   int64 // reserved for what was written since
	writing   int64 // reserved for what is being written
	measuring bool
	gone      bool
}

func newSpace(root string, quota int64) (*space, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: root, Err: err}
	}
	return &space{root: root, quota: quota, block: min(max(st.Bsize, 4096), 64<<10)}, nil
}

// blocks is what n bytes from off on take of a file at most, with what the file
// system may need to say where they are.
func (s *space) blocks(off, n int64) int64 {
	from := off / s.block * s.block
	return (off+n-from+s.block-1)/s.block*s.block + s.block
}

// limit is what may be used of the quota.
func (s *space) limit(u use) int64 {
	return s.quota - int64(u)*min(s.quota/spareShare, maxSpare)
}

// has returns nil if n more bytes may be used.
func (s *space) has(n int64, u use) error {
	s.mu.Lock()
	used := s.used
	s.mu.Unlock()
	if s.quota > 0 && used+n > s.limit(u) {
		return s.errQuota(used)
	}
	return s.diskHas(n, u)
}

func (s *space) errQuota(used int64) error {
	return fmt.Errorf("%w: cache_quota is %d MiB, and %d MiB are taken by images in use: remove some, or raise cache_quota",
		blockdev.ErrNoSpace, s.quota>>20, used>>20)
}

// diskHas asks the file system once in a while, and always when little is left.
func (s *space) diskHas(n int64, u use) error {
	if s.disk.Add(-n) >= 0 {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.root, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: s.root, Err: err}
	}
	total, free := int64(st.Blocks)*st.Bsize, int64(st.Bavail)*st.Bsize
	spare := min(total/spareShare, maxDiskSpare)
	if free-n < int64(u)*spare {
		return fmt.Errorf("%w: the disk of %s has %d MiB left: make room on it", blockdev.ErrNoSpace, s.root, free>>20)
	}
	// What is reserved without a look is kept clear of what others need.
	s.disk.Store(min(statStep, free-n-int64(forPrefetch)*spare))
	return nil
}

// take reserves n bytes for a chunk of t's diff.
func (s *space) take(t *taken, n int64, u use) error {
	if err := s.diskHas(n, u); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.quota > 0 && s.used+n > s.limit(u) {
		return s.errQuota(s.used)
	}
	s.used += n
	s.loose += n
	t.writing += n
	return nil
}

// wrote says that the write for which n bytes were reserved is over, well or
// not. It reports whether t's diff is to be measured.
func (s *space) wrote(t *taken, n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	t.writing -= n
	t.written += n
	return t.written >= measureStep
}

// measure looks up what d's files take. What is being written meanwhile is
// counted twice, which errs to the safe side.
func (s *space) measure(d *Diff) {
	t := &d.taken
	s.mu.Lock()
	if t.measuring || t.written == 0 {
		s.mu.Unlock()
		return
	}
	t.measuring = true
	covered := t.written // is in the files by now
	s.mu.Unlock()
	data, err := diskUse(d.data)
	fixed, ferr := d.fixedUse()
	s.mu.Lock()
	defer s.mu.Unlock()
	t.measuring = false
	if err != nil || ferr != nil || t.gone {
		return // removed since
	}
	s.used += data + fixed - t.measured - t.fixed - covered
	s.loose -= covered
	t.written -= covered
	t.measured, t.fixed = data, fixed
}

// settled reports whether a measurement could find room.
func (s *space) settled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.loose == 0
}

// add counts n bytes of no diff yet, if there is room.
func (s *space) add(n int64) error {
	if err := s.diskHas(n, forMeta); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.quota > 0 && s.used+n > s.limit(forMeta) {
		return s.errQuota(s.used)
	}
	s.used += n
	return nil
}

func (s *space) sub(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used -= n
}

// enter counts a diff that has been opened, leave one whose files are gone.
func (s *space) enter(d *Diff) error {
	fixed, err := d.fixedUse()
	if err != nil {
		return err
	}
	data, err := diskUse(d.data)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d.taken = taken{fixed: fixed, measured: data}
	s.used += fixed + data
	return nil
}

func (s *space) leave(d *Diff) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := &d.taken
	s.used -= t.fixed + t.measured + t.written + t.writing
	s.loose -= t.written + t.writing
	*t = taken{gone: true}
}

// extentsPerBlock is how many extents of a file a file system describes in one
// block, or fewer: ext4 has 340 in 4 KiB, xfs 254.
const extentsPerBlock = 250

// fixedUse is what all files of a diff but the data take, with its directory, and
// with room for what comes later by itself: the record of a proof, and where the
// data file's extents lie, which some file systems write down, and count, only
// with the data.
func (d *Diff) fixedUse() (n int64, err error) {
	n = int64(1+d.tab.Len()/extentsPerBlock) * d.c.space.block
	for _, name := range []string{"", indexFile, metaFile, bitmapFile, headersFile, ownIndexFile, ownMetaFile, proofFile} {
		var st unix.Stat_t
		path := filepath.Join(d.dir, name)
		err := unix.Lstat(path, &st)
		switch {
		case name == proofFile && (err != nil || st.Blocks*512 < d.c.space.block):
			n += d.c.space.block
		case (name == headersFile || name == ownIndexFile || name == ownMetaFile) && errors.Is(err, unix.ENOENT):
		case err != nil:
			return 0, &os.PathError{Op: "stat", Path: path, Err: err}
		default:
			n += st.Blocks * 512
		}
	}
	return n, nil
}

// FullUse is what the diff takes of the disk once it is complete, in bytes and
// inodes.
func (d *Diff) FullUse() (bytes, inodes int64, err error) {
	fixed, err := d.fixedUse()
	if err != nil {
		return 0, 0, err
	}
	// The header stream comes last.
	var st unix.Stat_t
	if err := unix.Lstat(d.headersPath(), &st); err != nil && !errors.Is(err, unix.ENOENT) {
		return 0, 0, &os.PathError{Op: "stat", Path: d.headersPath(), Err: err}
	}
	fixed += max(0, roundUp(d.heads.starts[len(d.heads.pieces)])-st.Blocks*512)
	// Its directory, data, index, metadata, bitmap, headers, and the records of a
	// proof and of a scrub.
	return fixed + d.size, 8, nil
}

// diskUse is what a file takes of the disk, in bytes.
func diskUse(f *os.File) (int64, error) {
	var st unix.Stat_t
	if err := disk.Control(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return 0, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st.Blocks * 512, nil
}

// errCounting: there is a quota, and what is on disk is not counted yet.
var errCounting = errors.New("the diffs are still being opened and counted")

// counted reports whether all that is on disk is in the count, so that the quota
// can be held.
func (c *Cache) counted() bool {
	select {
	case <-c.opened:
		return true
	default:
		return c.cfg.Quota == 0
	}
}

// roomFor reserves room for a chunk. Its error is errCounting for a moment after
// the start: the chunk is not kept then.
func (c *Cache) roomFor(d *Diff, n int64, u use) error {
	if !c.counted() {
		return errCounting
	}
	err := c.space.take(&d.taken, n, u)
	if errors.Is(err, blockdev.ErrNoSpace) && !c.space.settled() {
		for _, o := range *c.list.Load() {
			c.space.measure(o)
		}
		err = c.space.take(&d.taken, n, u)
	}
	if errors.Is(err, blockdev.ErrNoSpace) {
		c.makeRoom() // for those that come next: who has its bytes does not wait
	}
	return err
}

// eviction is one call of Config.MakeRoom.
type eviction struct {
	done  chan struct{}
	freed bool // set before done is closed
}

// makeRoom has Config.MakeRoom called, unless that is under way. Nil: there is
// nothing that could be removed.
func (c *Cache) makeRoom() *eviction {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.evicting != nil {
		return c.evicting
	}
	if c.cfg.MakeRoom == nil || c.closed || time.Since(c.evictedNone) < makeRoomPause {
		return nil
	}
	e := &eviction{done: make(chan struct{})}
	c.evicting = e
	c.wg.Add(1)
	go func() {
		defer c.wg.Done()
		freed := c.cfg.MakeRoom(c.life)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.evicting = nil; !freed {
			c.evictedNone = time.Now()
		}
		e.freed = freed
		close(e.done)
	}()
	return e
}

// waitRoom returns nil when try does. Between its attempts diffs that nobody
// uses are removed.
func (c *Cache) waitRoom(ctx context.Context, try func() error) error {
	if c.cfg.Quota > 0 {
		select {
		case <-c.opened:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for {
		err := try()
		if !errors.Is(err, blockdev.ErrNoSpace) {
			return err
		}
		e := c.makeRoom()
		if e == nil {
			return err
		}
		select {
		case <-e.done:
			if !e.freed {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
