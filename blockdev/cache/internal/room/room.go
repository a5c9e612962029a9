package room

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

// Use says what room is for. Each kind leaves some to those before it, so that
// prefetch does not fill the cache to the last byte, and an image that comes
// later still finds a place for its index and for what its programs read first.
type Use int64

const (
	ForMeta Use = iota // index, metadata and bitmap, without which nothing is lazy
	ForDemand
	ForPrefetch
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

// Room counts what the diffs take of the disk. Before a chunk is written, room
// for the most that it can take is reserved; now and then, what the file system
// says takes the place of what was reserved. So the count is never below what is
// on disk, and a reservation that is within the quota keeps the disk within it.
type Room struct {
	root  string
	quota int64 // bytes; 0: none
	Block int64 // of the file system
	log   *slog.Logger

	// disk is how many bytes may be reserved before the next statfs.
	disk atomic.Int64
	// untilWorks is how many bytes must be written before the disk is thought well; 0:
	// it is.
	untilWorks atomic.Int64

	counted chan struct{} // closed by Counted

	mu     sync.Mutex
	used   int64 // of all diffs
	loose  int64 // the part of used that a measurement may lower
	shares map[*Share]struct{}

	makeRoom    func(ctx context.Context) (freed bool)
	evicting    *eviction // under way
	evictedNone time.Time // when makeRoom found nothing last
	// life ends with Close, and with it makeRoom.
	life context.Context
	end  context.CancelFunc
	wg   sync.WaitGroup
}

// Share is one diff's part, guarded by the Room.
type Share struct {
	// Measure says what its files take, in bytes: the data, and all others.
	Measure func() (data, others int64, err error)

	others    int64 // all files but the data, and the directory, as the file system says
	data      int64 // the data file
	written   int64 // reserved for what was written since
	writing   int64 // reserved for what is being written
	measuring bool
}

// New counts below root. makeRoom is Config.MakeRoom.
func New(root string, quota int64, makeRoom func(context.Context) bool, log *slog.Logger) (*Room, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: root, Err: err}
	}
	r := &Room{
		root: root, quota: quota, Block: min(max(st.Bsize, 4096), 64<<10), log: log,
		counted: make(chan struct{}), shares: make(map[*Share]struct{}), makeRoom: makeRoom,
	}
	r.life, r.end = context.WithCancel(context.Background())
	return r, nil
}

// Close ends makeRoom. What waits for it gets the error that it had.
func (r *Room) Close() {
	r.mu.Lock()
	r.makeRoom = nil
	r.mu.Unlock()
	r.end()
	r.wg.Wait()
}

// Counted says that all diffs that were on disk have entered. Before, nothing is added to
// what a quota bounds.
func (r *Room) Counted() { close(r.counted) }

// Blocks is what n bytes from off on take of a file at most, with what the file
// system may need to say where they are.
func (r *Room) Blocks(off, n int64) int64 {
	from := off / r.Block * r.Block
	return (off+n-from+r.Block-1)/r.Block*r.Block + r.Block
}

// limit is what may be used of the quota.
func (r *Room) limit(u Use) int64 {
	return r.quota - int64(u)*min(r.quota/spareShare, maxSpare)
}

// Has returns nil if n more bytes may be used, now or after room was made.
func (r *Room) Has(ctx context.Context, n int64, u Use) error {
	return r.wait(ctx, func() error {
		r.mu.Lock()
		used := r.used
		r.mu.Unlock()
		if r.quota > 0 && used+n > r.limit(u) {
			return r.errQuota(used)
		}
		return r.diskHas(n, u)
	})
}

func (r *Room) errQuota(used int64) error {
	return fmt.Errorf("%w: cache_quota is %d MiB, and %d MiB are taken by images in use: remove some, or raise cache_quota",
		blockdev.ErrNoSpace, r.quota>>20, used>>20)
}

// diskHas asks the file system once in a while, and always when little is left.
func (r *Room) diskHas(n int64, u Use) error {
	if r.disk.Add(-n) >= 0 {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(r.root, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: r.root, Err: err}
	}
	total, free := int64(st.Blocks)*st.Bsize, int64(st.Bavail)*st.Bsize
	spare := min(total/spareShare, maxDiskSpare)
	if free-n < int64(u)*spare {
		return fmt.Errorf("%w: the disk of %s has %d MiB left: make room on it", blockdev.ErrNoSpace, r.root, free>>20)
	}
	// What is reserved without a look is kept clear of what others need.
	r.disk.Store(min(statStep, free-n-int64(ForPrefetch)*spare))
	return nil
}

// reserve counts n bytes, in t if it is not nil, if there is room.
func (r *Room) reserve(t *Share, n int64, u Use) error {
	if err := r.diskHas(n, u); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.quota > 0 && r.used+n > r.limit(u) {
		return r.errQuota(r.used)
	}
	r.used += n
	if t != nil {
		r.loose += n
		t.writing += n
	}
	return nil
}

// Take reserves n bytes for t's diff, if there is room or room can be made. The caller
// says by wrote that they are written.
func (r *Room) Take(ctx context.Context, t *Share, n int64, u Use) error {
	return r.wait(ctx, func() error { return r.reserve(t, n, u) })
}

// Try is take for a chunk whose bytes are at hand: it does not wait. Its error is
// ErrCounting for a moment after the start: the chunk is not kept then.
func (r *Room) Try(t *Share, n int64, u Use) error {
	if r.quota > 0 {
		select {
		case <-r.counted:
		default:
			return ErrCounting
		}
	}
	err := r.reserve(t, n, u)
	if errors.Is(err, blockdev.ErrNoSpace) && r.measureAll() {
		err = r.reserve(t, n, u)
	}
	if errors.Is(err, blockdev.ErrNoSpace) {
		r.evict() // for those that come next
	}
	return err
}

// ErrCounting: there is a quota, and what is on disk is not counted yet.
var ErrCounting = errors.New("the diffs are still being opened and counted")

// measureAll measures what a measurement may find room in, and reports whether there
// was any.
func (r *Room) measureAll() bool {
	r.mu.Lock()
	var all []*Share
	if r.loose > 0 {
		all = slices.Collect(maps.Keys(r.shares))
	}
	r.mu.Unlock()
	for _, t := range all {
		r.Remeasure(t)
	}
	return len(all) > 0
}

// Wrote says that the write for which n bytes were reserved is over, well or not. Now
// and then it measures.
func (r *Room) Wrote(t *Share, n int64) {
	r.mu.Lock()
	t.writing -= n
	t.written += n
	due := t.written >= measureStep
	r.mu.Unlock()
	if due {
		r.Remeasure(t)
	}
}

// Remeasure looks up what a diff's files take. What is being written meanwhile is
// counted twice, which errs to the safe side.
func (r *Room) Remeasure(t *Share) {
	r.mu.Lock()
	if t.measuring || t.written == 0 {
		r.mu.Unlock()
		return
	}
	t.measuring = true
	covered := t.written // is in the files by now
	r.mu.Unlock()
	data, others, err := t.Measure()
	r.mu.Lock()
	defer r.mu.Unlock()
	t.measuring = false
	if _, ok := r.shares[t]; err != nil || !ok {
		return // removed since
	}
	r.used += data + others - t.data - t.others - covered
	r.loose -= covered
	t.written -= covered
	t.data, t.others = data, others
}

// Add counts n bytes of no diff yet, if there is room or room can be made. The caller
// takes them out by sub.
func (r *Room) Add(ctx context.Context, n int64) error {
	return r.wait(ctx, func() error { return r.reserve(nil, n, ForMeta) })
}

// Sub takes out what Add has counted.
func (r *Room) Sub(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.used -= n
}

// Enter counts a diff that has been opened.
func (r *Room) Enter(t *Share) error {
	data, others, err := t.Measure()
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	t.data, t.others = data, others
	r.used += data + others
	r.shares[t] = struct{}{}
	return nil
}

// Leave takes out a diff whose files are gone.
func (r *Room) Leave(t *Share) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.used -= t.others + t.data + t.written + t.writing
	r.loose -= t.written + t.writing
	delete(r.shares, t)
}

// InUse is what all diffs take, in bytes, with what is reserved.
func (r *Room) InUse() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.used
}
