package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
)

// found is a diff on disk that has not been opened.
type found struct{ once sync.Once }

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
			c.cfg.Log.Warn("not a diff, left alone", "path", filepath.Join(c.cfg.Root, diffsDir, e.Name()))
			continue
		}
		c.found[id] = &found{}
	}
	return left, context.Cause(ctx)
}

// openFound opens everything that Open has found, and deletes what was left in tmp.
func (c *Cache) openFound(left []string) {
	defer close(c.opened)
	var g errgroup.Group
	defer func() { _ = g.Wait() }() // nothing of it fails
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, id := range c.Known() {
		g.Go(func() error {
			c.openNow(id)
			return nil
		})
	}
	for _, path := range left {
		if c.life.Err() != nil {
			return // the next Open goes on
		}
		if err := os.RemoveAll(path); err != nil {
			c.cfg.Log.Warn("what a crash left cannot be removed; the next start tries again", "path", path, "error", err)
		}
	}
}

// openNow opens a diff that was found, unless that has been done; if somebody is at
// it, openNow waits for him.
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
	f.once.Do(func() {
		d := c.openDir(id)
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.found, id)
		if d != nil {
			c.diffs[id] = d
			c.publish()
		}
	})
}

// openDir opens one directory of diffs. A diff that cannot be opened for other
// reasons than damage is left where it is, for the next Open or Add.
func (c *Cache) openDir(id blockdev.Digest) *Diff {
	dir := filepath.Join(c.cfg.Root, diffsDir, id.Hex())
	d, err := c.openDiff(dir, id)
	if err == nil {
		return d
	}
	if !errors.Is(err, blockdev.ErrCorrupt) {
		c.cfg.Log.Error("cannot open a diff; it is not used", "diff", id, "dir", dir, "cause", err)
		return nil
	}
	c.cfg.Log.Error("a diff is damaged and is dropped; it will be fetched again when it is added", "diff", id, "dir", dir, "cause", err)
	trash, err := c.discard(dir)
	if err == nil {
		err = os.RemoveAll(trash)
	}
	if err != nil {
		c.cfg.Log.Error("a damaged diff cannot be removed", "diff", id, "dir", dir, "cause", err)
	}
	return nil
}
