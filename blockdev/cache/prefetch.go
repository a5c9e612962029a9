package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
)

// Prefetch fetches every chunk that is missing, in order, and waits for
// demand reads. Nil means that the diff is complete: every byte is on stable
// storage and was checked by this process, or by the one that completed the
// diff. It ends at the first failure of the Source, and with
// blockdev.ErrNoSpace when the disk is full; what came until then stays, and a
// further call goes on from there. Several calls share the work.
func (d *Diff) Prefetch(ctx context.Context) error {
	if err := d.enter(); err != nil {
		return fmt.Errorf("prefetch of diff %v: %w", d.id, err)
	}
	defer d.wg.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(d.life, func() { cancel(context.Cause(d.life)) })()

	select {
	case d.prefetching <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("prefetch of diff %v: %w", d.id, context.Cause(ctx))
	}
	defer func() { <-d.prefetching }()
	if err := d.fill(ctx); err != nil {
		return fmt.Errorf("prefetch of diff %v: %w", d.id, err)
	}
	return nil
}

func (d *Diff) fill(ctx context.Context) error {
	for !d.complete.Load() {
		if err := d.fetchMissing(ctx); err != nil {
			return err
		}
		if err := d.checkOthers(ctx); err != nil {
			return err
		}
		if err := d.sync(ctx); err != nil {
			return err
		}
		// Not full if a chunk turned out to be damaged since: again.
		if d.pres.Full() {
			return d.markComplete()
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// fetchMissing passes over the missing chunks until there are none.
func (d *Diff) fetchMissing(ctx context.Context) error {
	for {
		_, before, _ := d.pres.Counts()
		if err := d.fetchPass(ctx); err != nil {
			// Others may have taken the room that there was when the pass began. It
			// goes on if there is more, or more can be made.
			_, now, _ := d.pres.Counts()
			if !errors.Is(err, blockdev.ErrNoSpace) || now == before || d.prefetchRoom(ctx) != nil {
				return err
			}
			continue
		}
		// What is missing still is in flight for somebody else.
		i := d.pres.NextMissing(0)
		if i == d.tab.Len() {
			return nil
		}
		d.mu.Lock()
		f := d.flights[i]
		d.mu.Unlock()
		if f != nil {
			select {
			case <-f.done:
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// fetchPass asks once for everything that is missing and not in flight.
func (d *Diff) fetchPass(ctx context.Context) error {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		first error
	)
	failed := func() error {
		mu.Lock()
		defer mu.Unlock()
		return first
	}
	defer wg.Wait()
	for next := 0; failed() == nil; {
		if err := d.paceWrites(ctx); err != nil {
			return err
		}
		if err := d.prefetchRoom(ctx); err != nil {
			return err
		}
		size, err := d.c.pace.Next(ctx, d.hurries.Load() > 0)
		if err != nil {
			return err
		}
		g, end := d.claim(ctx, next, size)
		if g == nil {
			break
		}
		next = end
		wg.Add(1)
		g.release = func(err error) {
			d.c.pace.Inflight.Free(g.owed)
			g.owed = 0
			mu.Lock()
			if first == nil && !errors.Is(err, errPromoted) {
				first = err
			}
			mu.Unlock()
			wg.Done()
		}
		go g.run()
	}
	wg.Wait()
	return failed()
}

// SetPrefetchRate changes Config.PrefetchRate; 0: no limit.
func (c *Cache) SetPrefetchRate(bytes int64) { c.pace.Rate.Set(bytes) }

// Hurry lifts Config.PrefetchRate for this diff until done is called: somebody
// waits for all of it.
func (d *Diff) Hurry() (done func()) {
	d.hurries.Add(1)
	return sync.OnceFunc(func() { d.hurries.Add(-1) })
}

// paceWrites waits for the disk when too much is written and not synced, so that
// prefetch does not fill memory with dirty pages.
func (d *Diff) paceWrites(ctx context.Context) error {
	if _, _, unsynced := d.pres.Counts(); unsynced < 4*d.c.cfg.SyncBytes {
		return nil
	}
	return d.sync(ctx)
}

// prefetchRoom returns nil if there is room for what prefetch may have under way.
func (d *Diff) prefetchRoom(ctx context.Context) error {
	return d.c.room.Has(ctx, d.c.pace.Inflight.Size(), room.ForPrefetch)
}

// claim makes a prefetch group of the next missing chunks from number i on that
// nobody has asked for, limit bytes or a little more, and returns it and where to go on; nil if there are none.
func (d *Diff) claim(ctx context.Context, i int, limit int64) (*group, int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gone != nil {
		return nil, 0
	}
	var g *group
	var size int64
	n := d.tab.Len()
	for i = d.pres.NextMissing(i); i < n && size < limit; i = d.pres.NextMissing(i + 1) {
		if f := d.flights[i]; f != nil && !f.over {
			continue
		}
		if g == nil {
			g = &group{d: d, prio: blockdev.Prefetch, parent: ctx}
		}
		d.depart(g, i)
		size += int64(d.tab.Length(i))
	}
	if g != nil {
		g.owed = size
		d.c.pace.Inflight.Take(size)
		d.wg.Add(1)
	}
	return g, i
}

// checkOthers reads what another process wrote and checks it, so that complete
// means more than what an old bitmap says.
func (d *Diff) checkOthers(ctx context.Context) error {
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
		b, off := buf[:d.tab.Length(i)], d.tab.Start(i)
		_, err := d.data.ReadAt(b, off)
		switch {
		case err != nil:
			d.damaged(i, err)
		case !d.tab.Check(i, b):
			d.damaged(i, blockdev.ErrCorrupt)
		default:
			d.pres.Check(i)
			d.Drop(off, len(b))
		}
	}
	return nil
}

// markComplete makes it durable that every chunk is there. The records go first:
// a header that says complete over records that do not is not believed.
func (d *Diff) markComplete() error {
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
