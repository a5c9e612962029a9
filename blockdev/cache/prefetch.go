package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
)

// Prefetch fetches every chunk that is missing, in order, and waits for
// demand reads. Nil means that the diff is complete: every byte is on stable
// storage and was checked by this process, or by the one that completed the
// diff. It ends at the first failure of the Source, and with
// blockdev.ErrNoSpace when the disk is full; what came until then stays, and a
// further call goes on from there. Several calls share the work.
func (d *Diff) Prefetch(ctx context.Context) error {
	ctx, leave, err := d.flights.enter(ctx)
	if err != nil {
		return fmt.Errorf("prefetch of diff %v: %w", d.id, err)
	}
	defer leave()

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
		if f := d.flights.get(i); f != nil {
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
		g := &group{fs: d.flights, prio: blockdev.Prefetch, parent: ctx}
		if g.owed, next = d.flights.claim(g, next, size); g.owed == 0 {
			break
		}
		d.c.pace.Inflight.Take(g.owed)
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

// Hurry says that a caller waits for all of this diff, until done is called. Its prefetch
// has no Config.PrefetchRate, its proof does not rest, and no prefetch or proof pauses
// because containers start: this diff may have to wait for another one's.
func (d *Diff) Hurry() (done func()) {
	d.hurries.Add(1)
	end := d.c.pace.Gate.Hurry()
	return sync.OnceFunc(func() {
		end()
		d.hurries.Add(-1)
	})
}

// prefetchRoom returns nil if there is room for what prefetch may have under way.
func (d *Diff) prefetchRoom(ctx context.Context) error {
	return d.c.room.Has(ctx, d.c.pace.Inflight.Size(), room.ForPrefetch)
}
