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
func (d *local) sync(ctx context.Context) error {
	select {
	case d.syncing <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-d.syncing }()
	if d.stopped != nil {
		return d.stopped // the files are about to be closed
	}
	return d.syncNow()
}

// syncNow is sync for the caller that has the token.
func (d *local) syncNow() error {
	if err := d.c.note(); err != nil {
		d.c.cfg.Log.Error("cannot sync a diff; a later sync tries again", "diff", d.id, "error", err)
		return d.c.room.Failed(d.id, fmt.Errorf("sync diff %v: %w", d.id, err))
	}
	if d.pres.BeginSync() {
		err := disk.Sync(d.data)
		ranges := d.pres.EndSync(err == nil)
		if err != nil {
			d.c.cfg.Log.Error("cannot sync a diff; the chunks that were not synced are fetched again", "diff", d.id, "file", d.DataPath(), "error", err)
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
func (d *local) Drop(off int64, n int) {
	if off < 0 || n <= 0 || off >= d.size {
		return
	}
	lo, hi := d.tab.Span(off, off+int64(n))
	if d.pres.SyncedAll(lo, hi) {
		disk.Drop(d.data, off, int64(n))
	}
}

// markComplete makes it durable that every chunk is there. The records go first:
// a header that says complete over records that do not is not believed.
func (d *local) markComplete() error {
	err := disk.Sync(d.bitmap)
	if err == nil {
		err = d.writeHeader(true)
	}
	if err == nil {
		err = disk.Sync(d.bitmap)
	}
	if err != nil {
		d.bitmapFailed(err)
		return d.c.room.Failed(d.id, fmt.Errorf("mark as complete: %w", err))
	}
	d.setComplete()
	// A chunk may have turned out to be damaged since fill looked.
	if !d.pres.Full() {
		d.complete.Store(false)
		return d.writeHeader(false)
	}
	return nil
}

// paceWrites waits for the disk when too much is written and not synced, so that
// prefetch does not fill memory with dirty pages.
func (d *local) paceWrites(ctx context.Context) error {
	if _, _, unsynced := d.pres.Counts(); unsynced < 4*d.c.cfg.SyncBytes {
		return nil
	}
	return d.sync(ctx)
}

// checkOthers reads what another process wrote and checks it, so that complete
// means more than what an old bitmap says.
func (d *local) checkOthers(ctx context.Context) error {
	i := d.pres.NextUnchecked(0)
	if i == d.tab.Len() {
		return nil
	}
	buf := d.c.buffer()
	defer d.c.buffers.Put(buf)
	for ; i < d.tab.Len(); i = d.pres.NextUnchecked(i + 1) {
		if _, err := d.c.pace.Gate.Wait(ctx); err != nil {
			return err
		}
		switch err := d.verify(i, buf[:d.tab.Length(i)]); {
		case err == nil, errors.Is(err, ErrDamaged), errors.Is(err, ErrIncomplete): // what is missing now is fetched again
		default:
			return err
		}
	}
	return nil
}
