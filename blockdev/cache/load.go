package cache

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
)

// Times between the attempts to open a diff that could not be opened for a reason
// that may pass.
const (
	firstReopen = time.Second
	lastReopen  = time.Minute
)

// found is a diff on disk that has not been opened.
type found struct {
	turn sync.Mutex // held while it is being opened, across I/O
	// over: it has been opened, or there is nothing to open. Guarded by turn, as is
	// the rest.
	over   bool
	failed int       // attempts
	next   time.Time // of the next one
}

// find lists the diffs on disk, and what a crash left in tmp.
func (c *Cache) find(ctx context.Context) (left []string, err error) {
	tmp, err := os.ReadDir(filepath.Join(c.cfg.Root, tmpDir))
	if err != nil {
		return nil, err
	}
	for _, e := range tmp {
		left = append(left, filepath.Join(c.cfg.Root, tmpDir, e.Name()))
	}
	dirs, err := os.ReadDir(filepath.Join(c.cfg.Root, diffsDir))
	if err != nil {
		return nil, err
	}
	for _, e := range dirs {
		id, ok := blockdev.ParseHex(e.Name())
		if !ok {
			c.cfg.Log.Warn("not a diff; ignored", "path", filepath.Join(c.cfg.Root, diffsDir, e.Name()))
			continue
		}
		c.found[id] = &found{}
	}
	return left, context.Cause(ctx)
}

// openFound opens everything that Open has found, and deletes what was left in tmp.
// What cannot be opened for a reason that may pass is tried again until it can.
func (c *Cache) openFound(left []string) {
	c.openAll()
	close(c.opened)
	if err := c.note(); err != nil {
		c.cfg.Log.Warn("cannot record that the node runs; the next sync of a diff tries again", "error", err)
	}
	c.room.Counted()
	c.lookedAt()
	c.sweep(left)
	t := time.NewTicker(firstReopen)
	defer t.Stop()
	for c.unopened() {
		select {
		case <-t.C:
			c.openAll()
			c.lookedAt()
		case <-c.life.Done():
			return
		}
	}
}

// sweep deletes what a crash left in tmp.
func (c *Cache) sweep(left []string) {
	defer close(c.swept)
	for _, path := range left {
		if c.life.Err() != nil {
			return // the next Open goes on
		}
		if err := os.RemoveAll(path); err != nil {
			c.cfg.Log.Warn("cannot remove files that a crash left; the next start tries again", "path", path, "error", err)
		}
	}
}

func (c *Cache) openAll() {
	var g errgroup.Group
	defer func() { _ = g.Wait() }() // nothing of it fails
	g.SetLimit(runtime.GOMAXPROCS(0))
	c.mu.Lock()
	ids := slices.Collect(maps.Keys(c.found))
	c.mu.Unlock()
	for _, id := range ids {
		g.Go(func() error {
			c.openNow(id)
			return nil
		})
	}
}

func (c *Cache) unopened() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.found) > 0
}

// lookedAt notes that an unclean end is dealt with, once no diff is left that has
// not been opened since: each says by itself from then on what of it is doubtful.
func (c *Cache) lookedAt() {
	if !c.unclean || c.unopened() || c.life.Err() != nil {
		return
	}
	if err := markOpen(c.openPath(), c.boot); err != nil {
		c.cfg.Log.Warn("cannot record that the diffs were opened after an unclean end; the next start checks the same chunks again", "error", err)
	}
}

// doubtful reports whether an unclean end has not been dealt with: then the file
// that says so stays.
func (c *Cache) doubtful() bool { return c.unclean && c.unopened() }

// openNow opens a diff that was found, unless that has been done, or has failed a
// moment ago; if another caller is at it, openNow waits for it.
func (c *Cache) openNow(id blockdev.Digest) {
	c.mu.Lock()
	f, ok := c.found[id]
	if !ok || c.closed {
		c.mu.Unlock()
		return
	}
	c.wg.Add(1)
	c.mu.Unlock()
	defer c.wg.Done()
	f.turn.Lock()
	defer f.turn.Unlock()
	if f.over || time.Now().Before(f.next) {
		return
	}
	d, err := c.openDir(id)
	if c.life.Err() != nil && d == nil {
		return // the next Open does it
	}
	if err != nil {
		wait := min(firstReopen<<min(f.failed, 10), lastReopen)
		f.failed++
		f.next = time.Now().Add(wait)
		c.cfg.Log.Error("cannot open a diff; reads of it fail until a later attempt succeeds", "diff", id, "next", wait, "error", err)
		return
	}
	f.over = true
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.found, id)
	if d != nil {
		c.diffs[id] = d
		c.publish()
	}
}

// giveUp ends the attempts to open a diff that was found and could not be opened.
func (c *Cache) giveUp(id blockdev.Digest) {
	c.mu.Lock()
	f, ok := c.found[id]
	c.mu.Unlock()
	if !ok {
		return
	}
	f.turn.Lock()
	defer f.turn.Unlock()
	f.over = true
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.found, id)
}

// openDir opens one directory of diffs. One that is damaged is removed, and neither
// diff nor error returned. An error means that it may be opened later.
func (c *Cache) openDir(id blockdev.Digest) (*Diff, error) {
	dir := filepath.Join(c.cfg.Root, diffsDir, id.Hex())
	d, err := c.openDiff(folder{dir, id})
	if !errors.Is(err, blockdev.ErrCorrupt) {
		return d, err
	}
	c.cfg.Log.Error("a diff is damaged and is removed; it is fetched again when it is added again", "diff", id, "dir", dir, "error", err)
	trash, err := c.discard(dir)
	if err == nil {
		err = os.RemoveAll(trash)
	}
	if err != nil {
		c.cfg.Log.Error("cannot remove a damaged diff", "diff", id, "dir", dir, "error", err)
	}
	return nil, nil
}
