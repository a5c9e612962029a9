package volume

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/fusefs"
)

// diff is what a volume needs of a local diff; *cache.Diff has it.
type diff interface {
	fusefs.File
	ID() blockdev.Digest
	MetaPath() string
	DataPath() string
	Complete() bool
	Completed() bool
	Prefetch(ctx context.Context) error
	Hurry() (done func())
	FetchStartup(ctx context.Context, chunks []uint32) error
	Prove(ctx context.Context, hurry bool) error
	Proof() cache.ProofState
	Distrust() error
	Scrub(ctx context.Context) error
	Scrubbed() time.Time
	Index() (*blockdev.Index, error)
	Verify(ctx context.Context, repair bool) (*cache.Inspection, error)
	Stat() cache.Stat
	FullUse() (bytes, inodes int64, err error)
}

// volume is one diff and its mount.
type volume struct {
	id   blockdev.Digest
	diff diff

	// turn is held (by sending) during anything that does I/O: mounting,
	// removing. A goroutine that gets it looks at gone first.
	turn chan struct{}

	mu   sync.Mutex // for what follows; never held across I/O
	gone bool       // removed: look it up again
	dir  string     // mount point, "" if not mounted
	meta string     // the metadata image that is mounted there
	lazy bool
	// home is the mount point that the volume had when the last process ended, if it is to be
	// mounted there again.
	home string
	// retired are the mounts that were replaced and are not unmounted yet, in the order in
	// which they were mounted.
	retired []retiree
	// stale: wrong bytes may have been read through the mounts.
	stale bool
	// started: a container has begun to read since it was mounted.
	started bool

	fetch fetchState // guarded by the lock of queues.prefetches
	proof fetchState // guarded by the lock of queues.proofs
	scrub fetchState // guarded by the lock of queues.scrubs
}

type retiree struct {
	dir   string // mount point
	since time.Time
}

// take waits for the volume's turn. The caller gives it back with give.
func (v *volume) take(ctx context.Context) error {
	select {
	case v.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (v *volume) give() { <-v.turn }

func (v *volume) mounted() (dir string, lazy, gone bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.dir, v.lazy, v.gone
}

// setMounted says where and how the volume is mounted from now on. If it was mounted at
// another place before, then that is a retiree.
func (v *volume) setMounted(dir, meta string, lazy bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dir != "" && v.dir != dir {
		v.retired = append(v.retired, retiree{v.dir, time.Now()})
	}
	v.dir, v.meta, v.lazy, v.started = dir, meta, lazy, false
}

func (v *volume) setUnmounted() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dir, v.meta, v.lazy, v.started = "", "", false, false
}

// retire says that what is mounted at dir has been replaced.
func (v *volume) retire(dir string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.retired = append(v.retired, retiree{dir, time.Now()})
}

// retireBefore is retire for what was replaced before all that is retired.
func (v *volume) retireBefore(dir string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.retired = slices.Insert(v.retired, 0, retiree{dir, time.Now()})
}

func (v *volume) setHome(dir string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.home = dir
}

func (v *volume) homeDir() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.home
}

// retirees returns the mount points of what was replaced before a time, the oldest first.
func (v *volume) retirees(before time.Time) (dirs []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, r := range v.retired {
		if r.since.Before(before) {
			dirs = append(dirs, r.dir)
		}
	}
	return dirs
}

// dropRetiree says that nothing of the volume is mounted at dir any more.
func (v *volume) dropRetiree(dir string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.retired = slices.DeleteFunc(v.retired, func(r retiree) bool { return r.dir == dir })
}

// mountPoints returns where something of the volume is mounted, what was replaced first.
func (v *volume) mountPoints() (dirs []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, r := range v.retired {
		dirs = append(dirs, r.dir)
	}
	if v.dir != "" {
		dirs = append(dirs, v.dir)
	}
	return dirs
}

// outdated reports whether what is mounted is not the tree that the diff shows now:
// its proof has replaced it since.
func (v *volume) outdated() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.dir != "" && v.meta != v.diff.MetaPath()
}

// firstStart reports whether the volume is mounted lazily and this is the first
// container that starts on that mount.
func (v *volume) firstStart() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	first := v.lazy && v.dir != "" && !v.started
	v.started = true
	return first
}

func (v *volume) setStarted(started bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.started = started
}

// setStale says that wrong bytes may have been read through the mounts. It reports
// whether that is new.
func (v *volume) setStale() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	first := !v.stale
	v.stale = true
	return first
}

// takeStale returns the mount point, and whether setStale was called since the last
// time.
func (v *volume) takeStale() (dir string, stale bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	stale, v.stale = v.stale, false
	return v.dir, stale
}
