package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/prefetch"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
	"github.com/shoalfs/shoal/blockdev/turns"
	"github.com/shoalfs/shoal/internal/durable"
)

const (
	diffsDir = "diffs"
	tmpDir   = "tmp"
	lockFile = "lock"
	openFile = "open"
)

// Cache is the local diffs of a node.
type Cache struct {
	*shared
	lock *os.File

	serial atomic.Uint64 // makes names in tmp unique

	started int64         // makes names in tmp unlike those of earlier processes
	opened  chan struct{} // closed when all diffs are open that were found
	swept   chan struct{} // closed when what a crash left in tmp is gone

	wg sync.WaitGroup // the syncer, and Adds and Removes under way

	mu     sync.Mutex
	closed bool
	diffs  map[blockdev.Digest]*Diff
	found  map[blockdev.Digest]*found        // not opened yet
	busy   map[blockdev.Digest]chan struct{} // being added or removed; closed when that is over
}

// Open opens the cache in cfg.Root, or makes it. It does not wait for the diffs to
// be read: each is opened when it is asked for, all of them in the background.
// Those whose index is damaged are dropped with a log line; so is what a crash
// left unfinished. It fails if another process has the cache open.
func Open(ctx context.Context, cfg Config) (*Cache, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	if cfg.bootID == "" {
		var err error
		if cfg.bootID, err = disk.BootID(); err != nil {
			return nil, fmt.Errorf("cache %s: %w", cfg.Root, err)
		}
	}
	for _, dir := range []string{cfg.Root, filepath.Join(cfg.Root, diffsDir), filepath.Join(cfg.Root, tmpDir), filepath.Join(cfg.Root, quarantineDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("cache: %w", err)
		}
	}
	lock, err := disk.Lock(filepath.Join(cfg.Root, lockFile))
	if err != nil {
		return nil, fmt.Errorf("cache %s: %w", cfg.Root, err)
	}
	c := &Cache{
		shared: &shared{
			cfg: cfg, boot: presence.HashBoot(cfg.bootID),
			demand: turns.New(cfg.DemandBytes, 0), held: turns.New(heldBytes, 0),
			decoding: semaphore.NewWeighted(cfg.IndexBytes),
			pace:     prefetch.New(cfg.Quiet, cfg.GiveWay, cfg.Inflight, cfg.PrefetchRate),
			kicked:   make(chan struct{}, 1),
		},
		lock:    lock,
		diffs:   make(map[blockdev.Digest]*Diff),
		found:   make(map[blockdev.Digest]*found),
		opened:  make(chan struct{}),
		swept:   make(chan struct{}),
		started: time.Now().UnixNano(),
		busy:    make(map[blockdev.Digest]chan struct{}),
	}
	c.publish()
	if c.unclean, err = wasUnclean(c.openPath(), c.boot); err != nil {
		return nil, errors.Join(fmt.Errorf("cache %s: %w", cfg.Root, err), lock.Close())
	}
	if err := durable.Sweep(filepath.Join(cfg.Root, quarantineDir)); err != nil {
		return nil, errors.Join(fmt.Errorf("cache %s: %w", cfg.Root, err), lock.Close())
	}
	c.quarantine, err = openQuarantine(filepath.Join(cfg.Root, quarantineDir), cfg.Log)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cache %s: %w", cfg.Root, err), lock.Close())
	}
	c.room, err = room.New(cfg.Root, cfg.Quota, cfg.MakeRoom, cfg.Log)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cache: %w", err), lock.Close())
	}
	left, err := c.find(ctx)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cache %s: %w", cfg.Root, err), lock.Close())
	}
	c.life, c.end = context.WithCancel(context.Background())
	c.wg.Go(c.syncer)
	c.wg.Go(func() { c.openFound(left) })
	return c, nil
}

func (c *shared) openPath() string { return filepath.Join(c.cfg.Root, openFile) }

// note records that the cache is open, unless that has been done. Chunks count as synced
// only after that, so reads of what is here need not wait for it. After an unclean end
// it leaves the record of that, for lookedAt.
func (c *shared) note() error {
	if c.unclean || c.noted.Load() {
		return nil
	}
	c.noting.Lock()
	defer c.noting.Unlock()
	if c.noted.Load() {
		return nil
	}
	if err := markOpen(c.openPath(), c.boot); err != nil {
		return fmt.Errorf("record that the cache is open: %w", err)
	}
	c.noted.Store(true)
	return nil
}

// wasUnclean reports whether a cache was open here during another boot, which then
// ended without Close. That stays so until markOpen: until every diff has been
// opened, a process that ends early must leave it to the next one.
func wasUnclean(path string, boot [16]byte) (bool, error) {
	old, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil && !bytes.Equal(old, boot[:]), err
}

// markOpen makes it durable that the cache is open during this boot. It writes also if the
// same bytes are there: the sync that followed them may have failed, and the kernel drops
// what it could not write, so another sync alone would succeed and prove nothing.
func markOpen(path string, boot [16]byte) error {
	// In place: half of it is another boot's, too.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(boot[:])
	if err := errors.Join(err, f.Truncate(int64(len(boot))), f.Sync(), f.Close()); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// ErrInUse: another process has the cache open. It would not know of this one's flights
// and bits.
var ErrInUse = disk.ErrLocked

// publish makes list again; mu is held, or nobody else knows of c.
func (c *Cache) publish() {
	list := make([]*local, 0, len(c.diffs))
	for _, d := range c.diffs {
		list = append(list, &d.local)
	}
	c.list.Store(&list)
}

// ExpectDemand says that demand reads are about to begin, since a program is
// being started: prefetch waits as if one had ended just now.
func (c *Cache) ExpectDemand() { c.pace.Gate.Expect() }

// Get returns the diff, if the cache has it.
func (c *Cache) Get(id blockdev.Digest) (*Diff, bool) {
	c.openNow(id)
	c.mu.Lock()
	defer c.mu.Unlock()
	d, ok := c.diffs[id]
	return d, ok
}

// Known returns the diffs that the cache has, as far as it knows before all of them
// are open, in no order.
func (c *Cache) Known() []blockdev.Digest {
	c.mu.Lock()
	defer c.mu.Unlock()
	ids := make([]blockdev.Digest, 0, len(c.diffs)+len(c.found))
	for id := range c.diffs {
		ids = append(ids, id)
	}
	for id := range c.found {
		ids = append(ids, id)
	}
	return ids
}

// Diffs returns all diffs, in no order. It waits until those are open that Open
// has found, or the cache is closed.
func (c *Cache) Diffs() []*Diff {
	<-c.opened
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Values(c.diffs))
}

// Sync syncs what was written to all diffs. What fails is logged, and will be
// fetched again.
func (c *Cache) Sync(ctx context.Context) {
	for _, d := range *c.list.Load() {
		_ = d.sync(ctx)
	}
}

// Close ends all reads and prefetches with ErrClosed, syncs what was written, and
// lets go of the directory. A second call does nothing.
func (c *Cache) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	c.end()
	c.room.Close()
	c.wg.Wait() // the syncer, and Adds and Removes under way
	var errs []error
	for _, d := range c.diffs { // which nothing changes any more
		d.stop(ErrClosed)
		errs = append(errs, d.syncNow(), d.closeFiles())
	}
	if errors.Join(errs...) == nil && !c.doubtful() {
		if err := os.Remove(c.openPath()); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(append(errs, c.lock.Close())...); err != nil {
		return fmt.Errorf("close cache %s: %w", c.cfg.Root, err)
	}
	return nil
}
