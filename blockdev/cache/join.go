package cache

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// wait is a flight that a reader waits for.
type wait struct {
	*flight
	own     bool // the reader's own request
	hurry   bool // a request of lower priority, when the reader joined
	startup bool // and that of startup chunks
}

// join returns the flights that chunks [lo, hi) need but for those that are held, and
// starts a request for those that nobody has asked for yet, with read-ahead. There are
// none if all are at hand.
func (fs *flights) join(lo, hi int, held map[int][]byte) ([]wait, error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.gone != nil {
		return nil, fs.gone
	}
	var waits []wait
	var own *group
	for i := lo; i < hi; i++ {
		if fs.pres.Has(i) || held[i] != nil {
			continue
		}
		f := fs.m[i]
		if f == nil {
			if own == nil {
				own = fs.group(blockdev.Demand, 0)
			}
			f = own.depart(i)
		}
		f.waiters++
		waits = append(waits, wait{
			flight: f, own: f.group == own,
			hurry: f.group.prio != blockdev.Demand, startup: f.group.prio == blockdev.Startup,
		})
	}
	if own != nil {
		ahead := fs.seq.Ahead(own.todo[0].chunk, fs.c.cfg.ReadAhead, fs.c.cfg.MaxReadAhead)
		end, i := fs.tab.Start(hi)+ahead, hi
		for ; i < fs.tab.Len() && fs.tab.Start(i+1) <= end; i++ {
			if fs.missing(i) {
				own.depart(i)
			}
		}
		fs.seq.Note(i, ahead)
		fs.launch(own)
	}
	return waits, nil
}

// joinOne returns the flight of chunk k to wait for, a new one for another node if there
// is none; without a flight if the chunk is there.
func (fs *flights) joinOne(k int, prio blockdev.Priority, hops int) (wait, error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.gone != nil {
		return wait{}, fs.gone
	}
	if fs.pres.Has(k) {
		return wait{}, nil
	}
	f := fs.m[k]
	own := f == nil
	if own {
		g := fs.group(prio, hops)
		f = g.depart(k)
		fs.launch(g)
	}
	f.waiters++
	// Only a demand read has a prefetch request hurry.
	hurry := prio == blockdev.Demand && f.group.prio == blockdev.Prefetch
	return wait{flight: f, own: own, hurry: hurry}, nil
}

// start asks for those of the chunks that are missing and not in flight, in requests of
// the usual size. Negative numbers are passed over.
func (fs *flights) start(chunks []int, prio blockdev.Priority, hops int) error {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.gone != nil {
		return fs.gone
	}
	var g *group
	var size int64
	for _, i := range chunks {
		if i < 0 || !fs.missing(i) {
			continue
		}
		if g == nil || size >= fs.c.cfg.RequestBytes {
			fs.launch(g)
			g, size = fs.group(prio, hops), 0
		}
		g.depart(i)
		size += int64(fs.tab.Length(i))
	}
	fs.launch(g)
	return nil
}

// claim fills a prefetch group with the next chunks from number i on that are missing and
// not in flight, limit bytes or a little more. It returns how many bytes these are, 0 if
// there are none, and where to go on. The caller runs the group.
func (fs *flights) claim(g *group, i int, limit int64) (size int64, end int) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.gone != nil {
		return 0, 0
	}
	n := fs.tab.Len()
	for i = fs.pres.NextMissing(i); i < n && size < limit; i = fs.pres.NextMissing(i + 1) {
		if f := fs.m[i]; f != nil && !f.over {
			continue
		}
		g.depart(i)
		size += int64(fs.tab.Length(i))
	}
	if size > 0 {
		fs.wg.Add(1)
	}
	return size, i
}

// claimAll fills a group with those of the chunks that are missing and that nobody has
// asked for, and reports whether there are any. The caller runs the group.
func (fs *flights) claimAll(g *group, chunks []uint32) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.gone != nil {
		return false
	}
	for _, c := range chunks {
		if i := int(c); i < fs.tab.Len() && fs.missing(i) {
			g.depart(i)
		}
	}
	if len(g.todo) == 0 {
		return false
	}
	fs.wg.Add(1)
	return true
}

// missing says whether nobody has asked for a chunk that is not present; mu is held.
func (fs *flights) missing(i int) bool { return !fs.pres.Has(i) && fs.m[i] == nil }

func (fs *flights) group(prio blockdev.Priority, hops int) *group {
	return &group{fs: fs, prio: prio, hops: hops, parent: fs.life, release: func(error) {}}
}

// launch runs a group, if there is one; mu is held.
func (fs *flights) launch(g *group) {
	if g != nil {
		fs.wg.Add(1)
		go g.run()
	}
}

// depart starts a flight as part of g; flights.mu is held.
func (g *group) depart(i int) *flight {
	f := &flight{chunk: i, group: g, done: make(chan struct{})}
	g.fs.m[i] = f
	g.todo = append(g.todo, f)
	return f
}

// errTimeout is the cause of the context that bounds a demand read.
var errTimeout = errors.New("demand read timed out")

// await returns when all flights are over. A flight of the reader's own request
// that failed is an error; what another asked for is left to the next round.
func (fs *flights) await(ctx context.Context, waits []wait) (err error) {
	defer fs.leave(waits)
	began := time.Now()
	var patience *time.Timer
	var hurry <-chan time.Time
	for _, w := range waits {
		if w.hurry && patience == nil {
			patience = time.NewTimer(fs.c.cfg.Promote)
			defer patience.Stop()
			hurry = patience.C
		}
		for done := false; !done; {
			select {
			case <-w.done:
				done = true
			case now := <-hurry:
				left := fs.c.pace.Arrivals.Patience(now, began, fs.c.cfg.Promote)
				for _, w := range waits {
					if w.hurry && (left == 0 || !w.startup) {
						w.group.hurry()
					}
				}
				if hurry = nil; left > 0 {
					patience.Reset(left)
					hurry = patience.C
				}
			case <-fs.life.Done():
				return context.Cause(fs.life)
			case <-ctx.Done():
				return fs.lateErr(ctx, w.flight)
			}
		}
		if w.err != nil && w.own {
			return w.err
		}
	}
	return nil
}

func (fs *flights) leave(waits []wait) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, w := range waits {
		w.waiters--
	}
}

// lateErr says why a read ended before it had its bytes.
func (fs *flights) lateErr(ctx context.Context, f *flight) error {
	cause := context.Cause(ctx)
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return cause
	}
	last := blockdev.ErrUnavailable
	if f != nil {
		fs.mu.Lock()
		if f.group.lastErr != nil {
			last = f.group.lastErr
		}
		fs.mu.Unlock()
	}
	if !errors.Is(cause, errTimeout) {
		return fmt.Errorf("%w: %w", cause, last) // the caller's deadline came first
	}
	return fmt.Errorf("gave up after %v: %w", fs.c.cfg.Timeout, last)
}
