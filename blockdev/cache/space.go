package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
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
	log   *slog.Logger

	// disk is how many bytes may be reserved before the next statfs.
	disk atomic.Int64
	// untilWorks is how many bytes must be written before the disk is thought well; 0:
	// it is.
	untilWorks atomic.Int64

	counted chan struct{} // closed when all that is on disk is counted

	mu     sync.Mutex
	used   int64 // of all diffs
	loose  int64 // the part of used that a measurement may lower
	shares map[*share]struct{}

	makeRoom    func(ctx context.Context) (freed bool)
	evicting    *eviction // under way
	evictedNone time.Time // when makeRoom found nothing last
	// life ends with close, and with it makeRoom.
	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup
}

// share is one diff's part, guarded by space.mu.
type share struct {
	// measure says what its files take, in bytes: the data, and all others.
	measure func() (data, others int64, err error)

	others    int64 // all files but the data, and the directory, as the file system says
	data      int64 // the data file
	written   int64 // reserved for what was written since
	writing   int64 // reserved for what is being written
	measuring bool
}

// newSpace counts below root. makeRoom is Config.MakeRoom.
func newSpace(root string, quota int64, makeRoom func(context.Context) bool, log *slog.Logger) (*space, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: root, Err: err}
	}
	s := &space{
		root: root, quota: quota, block: min(max(st.Bsize, 4096), 64<<10), log: log,
		counted: make(chan struct{}), shares: make(map[*share]struct{}), makeRoom: makeRoom,
	}
	s.life, s.end = context.WithCancel(context.Background())
	return s, nil
}

// close ends makeRoom. What waits for it gets the error that it had.
func (s *space) close() {
	s.mu.Lock()
	s.makeRoom = nil
	s.mu.Unlock()
	s.end()
	s.wg.Wait()
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

// has returns nil if n more bytes may be used, now or after room was made.
func (s *space) has(ctx context.Context, n int64, u use) error {
	return s.wait(ctx, func() error {
		s.mu.Lock()
		used := s.used
		s.mu.Unlock()
		if s.quota > 0 && used+n > s.limit(u) {
			return s.errQuota(used)
		}
		return s.diskHas(n, u)
	})
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

// reserve counts n bytes, in t if it is not nil, if there is room.
func (s *space) reserve(t *share, n int64, u use) error {
	if err := s.diskHas(n, u); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.quota > 0 && s.used+n > s.limit(u) {
		return s.errQuota(s.used)
	}
	s.used += n
	if t != nil {
		s.loose += n
		t.writing += n
	}
	return nil
}

// take reserves n bytes for t's diff, if there is room or room can be made. The caller
// says by wrote that they are written.
func (s *space) take(ctx context.Context, t *share, n int64, u use) error {
	return s.wait(ctx, func() error { return s.reserve(t, n, u) })
}

// try is take for a chunk whose bytes are at hand: it does not wait. Its error is
// errCounting for a moment after the start: the chunk is not kept then.
func (s *space) try(t *share, n int64, u use) error {
	if s.quota > 0 {
		select {
		case <-s.counted:
		default:
			return errCounting
		}
	}
	err := s.reserve(t, n, u)
	if errors.Is(err, blockdev.ErrNoSpace) && s.measureAll() {
		err = s.reserve(t, n, u)
	}
	if errors.Is(err, blockdev.ErrNoSpace) {
		s.evict() // for those that come next
	}
	return err
}

// errCounting: there is a quota, and what is on disk is not counted yet.
var errCounting = errors.New("the diffs are still being opened and counted")

// measureAll measures what a measurement may find room in, and reports whether there
// was any.
func (s *space) measureAll() bool {
	s.mu.Lock()
	var all []*share
	if s.loose > 0 {
		all = slices.Collect(maps.Keys(s.shares))
	}
	s.mu.Unlock()
	for _, t := range all {
		s.remeasure(t)
	}
	return len(all) > 0
}

// wrote says that the write for which n bytes were reserved is over, well or not. Now
// and then it measures.
func (s *space) wrote(t *share, n int64) {
	s.mu.Lock()
	t.writing -= n
	t.written += n
	due := t.written >= measureStep
	s.mu.Unlock()
	if due {
		s.remeasure(t)
	}
}

// remeasure looks up what a diff's files take. What is being written meanwhile is
// counted twice, which errs to the safe side.
func (s *space) remeasure(t *share) {
	s.mu.Lock()
	if t.measuring || t.written == 0 {
		s.mu.Unlock()
		return
	}
	t.measuring = true
	covered := t.written // is in the files by now
	s.mu.Unlock()
	data, others, err := t.measure()
	s.mu.Lock()
	defer s.mu.Unlock()
	t.measuring = false
	if _, ok := s.shares[t]; err != nil || !ok {
		return // removed since
	}
	s.used += data + others - t.data - t.others - covered
	s.loose -= covered
	t.written -= covered
	t.data, t.others = data, others
}

// add counts n bytes of no diff yet, if there is room or room can be made. The caller
// takes them out by sub.
func (s *space) add(ctx context.Context, n int64) error {
	return s.wait(ctx, func() error { return s.reserve(nil, n, forMeta) })
}

func (s *space) sub(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used -= n
}

// enter counts a diff that has been opened.
func (s *space) enter(t *share) error {
	data, others, err := t.measure()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t.data, t.others = data, others
	s.used += data + others
	s.shares[t] = struct{}{}
	return nil
}

// leave takes out a diff whose files are gone.
func (s *space) leave(t *share) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used -= t.others + t.data + t.written + t.writing
	s.loose -= t.written + t.writing
	delete(s.shares, t)
}

// inUse is what all diffs take, in bytes, with what is reserved.
func (s *space) inUse() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used
}
