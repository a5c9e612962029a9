package cache

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
)

// sync takes what is present to stable storage, tells the bitmap so, and drops
// the pages: EROFS has its own copy of those that somebody reads. (Not while a
// container starts: it is about to read them.) One sync of a
// diff at a time; d.syncing is the token that says whose turn it is.
func (d *Diff) sync(ctx context.Context) error {
	select {
	case d.syncing <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-d.syncing }()
	if d.life.Err() != nil {
		return context.Cause(d.life) // the files are about to be closed
	}
	return d.syncNow()
}

// syncNow is sync for who has the token.
func (d *Diff) syncNow() error {
	if d.pres.BeginSync() {
		err := disk.Sync(d.data)
		ranges := d.pres.EndSync(err == nil)
		if err != nil {
			d.c.cfg.Log.Error("cannot sync a diff; the chunks that were not synced are fetched again", "diff", d.id, "file", d.DataPath(), "cause", err)
		}
		if perr := d.pres.Persist(d.bitmap, true); perr != nil {
			d.bitmapFailed(perr)
			err = errors.Join(err, perr)
		}
		if err != nil {
			return d.c.room.Failed(d.id, fmt.Errorf("sync diff %v: %w", d.id, err))
		}
		if until := d.keep.Load(); until != 0 {
			if time.Now().UnixNano() < until {
				return nil
			}
			d.keep.Store(0)
			disk.Drop(d.data, 0, 0) // all that was left there
		}
		for _, r := range ranges {
			from := d.tab.Start(r[0])
			disk.Drop(d.data, from, d.tab.Start(r[1])-from)
		}
		return nil
	}
	if err := d.pres.Persist(d.bitmap, true); err != nil {
		d.bitmapFailed(err)
		return d.c.room.Failed(d.id, fmt.Errorf("write bitmap of diff %v: %w", d.id, err))
	}
	return nil
}

// Drop says that the bytes [off, off+n) of the data file have been handed on and
// need not stay in the page cache of the file itself. It is a hint: pages that
// the range covers in part stay, and what is not synced yet goes with the next
// sync.
func (d *Diff) Drop(off int64, n int) {
	if off < 0 || n <= 0 || off >= d.size {
		return
	}
	lo, hi := d.tab.Span(off, off+int64(n))
	if d.pres.SyncedAll(lo, hi) {
		disk.Drop(d.data, off, int64(n))
	}
}

// syncer syncs diffs in the background, one at a time: those with much unsynced
// when kicked, all of them at every interval.
func (c *Cache) syncer() {
	t := time.NewTicker(c.cfg.SyncInterval)
	defer t.Stop()
	for {
		least := c.cfg.SyncBytes
		select {
		case <-c.life.Done():
			return
		case <-t.C:
			least = 1
		case <-c.kicked:
		}
		for _, d := range *c.list.Load() {
			if _, _, unsynced := d.pres.Counts(); unsynced >= least && c.life.Err() == nil {
				// sync has logged its error, and the next interval tries again.
				_ = d.sync(c.life)
			}
		}
	}
}

func (c *Cache) kick() {
	select {
	case c.kicked <- struct{}{}:
	default:
	}
}
