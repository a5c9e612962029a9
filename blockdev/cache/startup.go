package cache

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
)

// FetchStartup fetches those of the chunks (numbers in the chunk table) that are
// missing and that no reader has asked for, in one request of their own priority:
// a container that starts is about to read them. Numbers that the diff does not
// have are passed over. It does not wait for demand reads, whose requests
// overtake this one; prefetch waits for it. The caller bounds the request by
// the number of chunks. It returns when the request is over: an error is the
// Source's, the disk's, ctx's, ErrRemoved or ErrClosed.
func (d *Diff) FetchStartup(ctx context.Context, chunks []uint32) error {
	ctx, leave, err := d.flights.enter(ctx)
	if err != nil {
		return fmt.Errorf("startup chunks of diff %v: %w", d.id, err)
	}
	defer leave()
	g := &group{fs: d.flights, prio: blockdev.Startup, parent: ctx, release: func(e error) { err = e }}
	if !d.flights.claimAll(g, chunks) {
		return nil
	}
	d.c.pace.Gate.Enter(&d.flights.reading)
	defer d.c.pace.Gate.Leave(&d.flights.reading)
	d.keep.Store(time.Now().Add(keepStartup).UnixNano())
	g.run()
	if err != nil {
		return fmt.Errorf("startup chunks of diff %v: %w", d.id, err)
	}
	return nil
}

// keepStartup is how long pages of startup chunks stay in the page cache after
// they were synced, so that the container that is about to read them does not
// wait for the disk.
const keepStartup = 30 * time.Second

// Recording notes which chunks of some diffs are read, whether they are there
// already or not, in the order of their first touch among all these diffs. It is
// bounded: blockdev.MaxProfile chunks of each diff. While it sees new ones, prefetch
// waits as it does for demand reads.
type Recording struct {
	tracks []*track
	ranks  atomic.Uint32
	last   atomic.Int64 // Unix nanoseconds of the last first touch; 0: none
}

// track is a Recording's part on one diff.
type track struct {
	r    *Recording
	d    *Diff
	seen presence.Bitset

	mu      sync.Mutex
	touches blockdev.Profile
}

// Record starts to note the reads of diffs. One that another Recording notes is
// left out. The caller must Stop it.
func Record(diffs ...*Diff) *Recording {
	r := &Recording{}
	for _, d := range diffs {
		t := &track{r: r, d: d, seen: presence.NewBitset(d.tab.Len())}
		if d.track.CompareAndSwap(nil, t) {
			r.tracks = append(r.tracks, t)
		}
	}
	return r
}

// touch notes a read of the chunks [lo, hi).
func (t *track) touch(lo, hi int) {
	if t.seen.All(lo, hi) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := lo; i < hi; i++ {
		if t.seen.Get(i) {
			continue
		}
		t.seen.Set(i)
		if len(t.touches) < blockdev.MaxProfile {
			t.touches = append(t.touches, blockdev.Touch{Chunk: uint32(i), Rank: t.r.ranks.Add(1) - 1})
		}
	}
	t.r.last.Store(time.Now().UnixNano())
	t.d.c.pace.Gate.Starting()
}

// Last returns when a chunk was touched for the first time last; the zero time if
// none was.
func (r *Recording) Last() time.Time {
	if n := r.last.Load(); n != 0 {
		return time.Unix(0, n)
	}
	return time.Time{}
}

// Stop ends the recording and returns what it has noted, without diffs of which
// nothing was read.
func (r *Recording) Stop() []blockdev.DiffProfile {
	var all []blockdev.DiffProfile
	for _, t := range r.tracks {
		t.d.track.CompareAndSwap(t, nil)
		t.mu.Lock()
		p := t.touches
		t.touches = nil
		t.mu.Unlock()
		if len(p) > 0 {
			all = append(all, blockdev.DiffProfile{Diff: t.d.id, Profile: p})
		}
	}
	return all
}
