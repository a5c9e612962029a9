package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
	"github.com/shoalfs/shoal/blockdev/cache/internal/table"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/durable"
)

// reserve waits until nobody adds or removes id, and keeps others from it until
// the returned function is called. Returns the diff if there is one.
func (c *Cache) reserve(ctx context.Context, id blockdev.Digest) (*Diff, func(), error) {
	c.openNow(id)
	for {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil, nil, ErrClosed
		}
		ch, ok := c.busy[id]
		if !ok {
			ch = make(chan struct{})
			c.busy[id] = ch
			c.wg.Add(1)
			d := c.diffs[id]
			c.mu.Unlock()
			return d, func() {
				c.mu.Lock()
				delete(c.busy, id)
				c.mu.Unlock()
				close(ch)
				c.wg.Done()
			}, nil
		}
		c.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}
}

// Add makes a diff from its encoded index, or returns the one that is there. It
// fails with blockdev.ErrCorrupt or blockdev.ErrUnsupported if the index does not
// parse, with blockdev.ErrQuarantined if it is known not to be that of its DiffID,
// and with blockdev.ErrNoSpace.
func (c *Cache) Add(ctx context.Context, encodedIndex []byte) (*Diff, error) {
	return c.AddChecked(ctx, encodedIndex, nil)
}

// AddChecked is Add, but that it shows the decoded index to check, unless that is nil;
// its error ends the Add. check keeps nothing that refers to the index's Meta, which
// has its memory for as long as the call takes only.
func (c *Cache) AddChecked(ctx context.Context, encodedIndex []byte, check func(*blockdev.Index) error) (*Diff, error) {
	info, err := index.Peek(encodedIndex)
	if err != nil {
		return nil, fmt.Errorf("add diff: index: %w", err)
	}
	if info.Tree > c.cfg.MaxTree || info.Memory > c.cfg.MaxIndex {
		return nil, fmt.Errorf("add diff %v: its index has %d MiB of file names and attributes, and takes %d MiB of memory to read; a node takes at most %d and %d: %w",
			info.DiffID, info.Tree>>20, info.Memory>>20, c.cfg.MaxTree>>20, c.cfg.MaxIndex>>20, blockdev.ErrUnsupported)
	}
	// Before there is memory for it: a caller that has it waits for no other.
	d, release, err := c.reserve(ctx, info.DiffID)
	if err != nil {
		return nil, fmt.Errorf("add diff %v: %w", info.DiffID, err)
	}
	defer release()
	ix, done, err := c.decode(ctx, encodedIndex)
	if err != nil {
		return nil, fmt.Errorf("add diff %v: index: %w", info.DiffID, err)
	}
	defer done()
	tab, err := table.New(ix)
	if err != nil {
		return nil, fmt.Errorf("add diff %v: index: %w", ix.DiffID, err)
	}
	if check != nil {
		if err := check(ix); err != nil {
			return nil, fmt.Errorf("add diff %v: %w", ix.DiffID, err)
		}
	}
	if c.quarantine.has(ix.DiffID, blockdev.Sum(encodedIndex)) {
		return nil, fmt.Errorf("add diff: %w", c.quarantine.why(ix.DiffID))
	}
	if d != nil {
		if err := d.Distrust(); err != nil {
			return nil, fmt.Errorf("add diff: %w", err)
		}
		return d, nil
	}
	if d, err = c.create(ctx, encodedIndex, ix, tab); err != nil {
		if disk.Full(err) {
			err = fmt.Errorf("%w: %w", blockdev.ErrNoSpace, err)
		}
		return nil, fmt.Errorf("add diff %v: %w", ix.DiffID, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.diffs[ix.DiffID] = d
	c.publish()
	return d, nil
}

func (c *Cache) create(ctx context.Context, enc []byte, ix *blockdev.Index, tab *table.Table) (*Diff, error) {
	diffs := filepath.Join(c.cfg.Root, diffsDir)
	dir := filepath.Join(diffs, ix.DiffID.Hex())
	if _, err := os.Lstat(dir); err == nil {
		// A diff that Open could not use.
		c.giveUp(ix.DiffID)
		trash, err := c.discard(dir)
		if err == nil {
			err = os.RemoveAll(trash)
		}
		if err != nil {
			return nil, err
		}
	}
	// Until the diff is counted by itself: two directories, the record of a proof to
	// come, the data file's extents, and three files.
	need := int64(4+tab.Len()/extentsPerBlock) * c.room.Block
	for _, n := range []int64{int64(len(enc)), int64(len(ix.Meta)), presence.FileSize(len(ix.Chunks))} {
		need += c.room.Blocks(0, n)
	}
	if err := c.room.Add(ctx, need); err != nil {
		return nil, err
	}
	defer c.room.Sub(need)
	tmp := c.tmpName()
	if err := writeDiff(tmp, enc, ix, c.boot); err != nil {
		return nil, errors.Join(err, os.RemoveAll(tmp))
	}
	if err := os.Rename(tmp, dir); err != nil {
		return nil, errors.Join(err, os.RemoveAll(tmp))
	}
	if err := durable.SyncDir(diffs); err != nil {
		return nil, err
	}
	d, err := c.newDiff(folder{dir, ix.DiffID}, blockdev.Sum(enc), ix, tab)
	if err == nil {
		d.scrubbed.now() // there is nothing to check yet
	}
	return d, err
}

func (c *Cache) tmpName() string {
	return filepath.Join(c.cfg.Root, tmpDir, fmt.Sprintf("%x-%d", c.started, c.serial.Add(1)))
}

// discard takes a diff's directory away in one step and returns where to; what
// is left of it after a crash is deleted by Open.
func (c *Cache) discard(dir string) (string, error) {
	trash := c.tmpName()
	return trash, os.Rename(dir, trash)
}

// Remove takes a diff out of the cache and deletes its files. Reads and prefetches
// of it end with ErrRemoved. If ctx ends first, the diff is gone, too, and
// its files are deleted as soon as the Source has let go of its requests. A diff
// that is not there is no error. The caller makes sure that no EROFS mount uses
// the files; one that does keeps their disk space.
func (c *Cache) Remove(ctx context.Context, id blockdev.Digest) error {
	d, release, err := c.reserve(ctx, id)
	if err != nil {
		return fmt.Errorf("remove diff %v: %w", id, err)
	}
	if d == nil {
		defer release()
		return c.deleteUnopened(id)
	}
	trash, err := c.discard(d.dir)
	if err != nil {
		release()
		return fmt.Errorf("remove diff %v: %w", id, err)
	}
	c.mu.Lock()
	delete(c.diffs, id)
	c.publish()
	c.mu.Unlock()

	done := make(chan error, 1)
	go func() {
		d.stop(ErrRemoved)
		c.recent.forget(&d.local)
		err := errors.Join(d.closeFiles(), os.RemoveAll(trash))
		c.room.Leave(&d.share)
		release()
		done <- err
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("remove diff %v: %w", id, err)
	}
	return nil
}

// RemoveUnopened is Remove for a diff that is not open. A diff that has been added or
// opened by now stays, and opened is true.
func (c *Cache) RemoveUnopened(ctx context.Context, id blockdev.Digest) (opened bool, err error) {
	d, release, err := c.reserve(ctx, id)
	if err != nil {
		return false, fmt.Errorf("remove diff %v: %w", id, err)
	}
	defer release()
	if d != nil {
		return true, nil
	}
	return false, c.deleteUnopened(id)
}

// deleteUnopened deletes what is there of a diff that could not be opened. The
// caller has reserved it.
func (c *Cache) deleteUnopened(id blockdev.Digest) error {
	c.mu.Lock()
	_, ok := c.found[id]
	c.mu.Unlock()
	if !ok {
		return nil
	}
	c.giveUp(id)
	trash, err := c.discard(filepath.Join(c.cfg.Root, diffsDir, id.Hex()))
	if err == nil {
		err = os.RemoveAll(trash)
	}
	if err != nil {
		return fmt.Errorf("remove diff %v, which could not be opened: %w", id, err)
	}
	return nil
}
