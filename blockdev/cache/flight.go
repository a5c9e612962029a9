package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
)

const (
	firstBackoff = 20 * time.Millisecond
	lastBackoff  = time.Second
)

// errPromoted ends a request of lower priority of which a demand read has waited too
// long. It never reaches a caller.
var errPromoted = errors.New("asked for again with demand priority")

// flight is the one attempt under way to get a missing chunk.
type flight struct {
	chunk   int
	group   *group
	waiters int           // demand reads that wait; Diff.mu
	over    bool          // Diff.mu
	done    chan struct{} // closed after mem, from and err are set
	// mem holds the bytes if they could not be written, and then the flight stays
	// listed for a while (recent); otherwise they are in the data file, unless err
	// says why they are not.
	mem  []byte
	from blockdev.Origin // of the bytes
	err  error
	// Used by the group only. remote: copying it from this disk has failed.
	// got: the Source has delivered it.
	remote, got bool
}

// group is the flights that go into one request, and its retries.
type group struct {
	d    *Diff
	todo []*flight
	hops int // of the request of another node that it is for; 0: this node's own
	// parent ends the group: the diff's life, or what called Prefetch.
	parent context.Context
	// release is called once, when the group ends or is a prefetch no longer.
	release func(error)
	// owed is how many bytes of Cache.window the group has still. Used by attempts, one
	// at a time.
	owed int64
	from blockdev.Origin // of the chunk that the Source delivers

	// Under Diff.mu:
	prio     blockdev.Priority
	promoted bool
	cancel   context.CancelCauseFunc // of the attempt under way
	lastErr  error
}

// finish ends a flight; only the first call counts.
func (d *Diff) finish(f *flight, mem []byte, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f.over {
		return
	}
	f.over, f.mem, f.err = true, mem, err
	if mem == nil && d.flights[f.chunk] == f {
		delete(d.flights, f.chunk)
	}
	close(f.done)
}

// outcome returns where the chunk has come from if the flight is over, and its bytes if
// they could not be written.
func (f *flight) outcome() (unwritten []byte, from blockdev.Origin) {
	select {
	case <-f.done:
		return f.mem, f.from
	default:
		return nil, blockdev.FromLocal
	}
}

func (d *Diff) awaited(f *flight) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return f.waiters > 0
}

// run gets the group's chunks. A demand group tries again until it has them or
// nobody waits; any other tries once.
func (g *group) run() {
	defer g.d.wg.Done()
	err := g.get()
	g.end(err)
	g.release(err)
}

func (g *group) get() error {
	d := g.d
	for try := 0; ; try++ {
		err := g.bounded()
		if g.compact(); len(g.todo) == 0 {
			return nil
		}
		if d.life.Err() != nil {
			return context.Cause(d.life)
		}
		if g.promote() {
			// Nobody waits for those that are left out here.
			g.keepAwaited(errPromoted)
			try = -1
			continue
		}
		if err == nil {
			continue // what could not be copied on this disk is fetched now
		}
		if g.prio != blockdev.Demand || !worthRetry(err) {
			return err
		}
		if g.keepAwaited(err); len(g.todo) == 0 {
			return err
		}
		d.mu.Lock()
		g.lastErr = err
		d.mu.Unlock()
		t := time.NewTimer(min(firstBackoff<<min(try, 16), lastBackoff))
		select {
		case <-t.C:
		case <-d.life.Done():
			t.Stop()
		}
	}
}

// errNobody ends a demand group that nobody waits for by the time it has its turn.
var errNobody = fmt.Errorf("no read waits for it any more: %w", blockdev.ErrUnavailable)

// bounded is an attempt within what the diff may have in flight: what it may have is
// taken for one attempt and not for the pauses in between.
func (g *group) bounded() error {
	if g.prio != blockdev.Demand {
		return g.attempt()
	}
	// The sum is at most DemandBytes: Config checks it, and a group is made
	// within RequestBytes and MaxReadAhead.
	var size int64
	for _, f := range g.todo {
		size += int64(g.d.tab.Length(f.chunk))
	}
	waited := g.d.c.demand.Take(g.d.id, size)
	defer g.d.c.demand.Give(g.d.id, size)
	if g.d.life.Err() != nil {
		return context.Cause(g.d.life)
	}
	if waited && !slices.ContainsFunc(g.todo, g.d.awaited) {
		return errNobody
	}
	return g.attempt()
}

// worthRetry: asking again may help.
func worthRetry(err error) bool {
	return !errors.Is(err, blockdev.ErrNotFound) && !errors.Is(err, blockdev.ErrUnauthorized) && !errors.Is(err, blockdev.ErrUnsupported)
}

// promote turns a group of lower priority that demand reads wait for into a
// demand group, and reports whether it did.
func (g *group) promote() bool {
	g.d.mu.Lock()
	now := g.promoted && g.prio != blockdev.Demand
	if now {
		g.prio = blockdev.Demand
		g.parent = g.d.life
	}
	g.d.mu.Unlock()
	if now {
		g.release(nil)
		g.release = func(error) {}
	}
	return now
}

// hurry is called by a demand read that waits for the group.
func (g *group) hurry() {
	g.d.mu.Lock()
	defer g.d.mu.Unlock()
	if g.prio != blockdev.Demand && !g.promoted {
		g.promoted = true
		if g.cancel != nil {
			g.cancel(errPromoted)
		}
	}
}

// compact takes the flights that are over out of todo.
func (g *group) compact() {
	g.d.mu.Lock()
	defer g.d.mu.Unlock()
	k := 0
	for _, f := range g.todo {
		if !f.over {
			g.todo[k] = f
			k++
		}
	}
	clear(g.todo[k:])
	g.todo = g.todo[:k]
}

// keepAwaited ends the flights that nobody waits for with err.
func (g *group) keepAwaited(err error) {
	for _, f := range g.todo {
		if !g.d.awaited(f) {
			g.d.finish(f, nil, err)
		}
	}
	g.compact()
}

func (g *group) end(err error) {
	if err == nil {
		return
	}
	for _, f := range g.todo {
		g.d.finish(f, nil, err)
	}
}

// attempt tries to get all of todo: from this disk what is there, in one
// request to the Source what is not. What it got is over when it returns. Nil
// means that nothing stands in the way of going on with the rest.
func (g *group) attempt() error {
	ctx, cancel := context.WithCancelCause(g.parent)
	defer cancel(nil)
	g.d.mu.Lock()
	g.cancel = cancel
	if g.promoted && g.prio != blockdev.Demand {
		cancel(errPromoted)
	}
	prio := g.prio
	g.d.mu.Unlock()

	local, remote := g.split()
	var wg sync.WaitGroup
	if len(remote) == 0 {
		g.copyLocal(ctx, local)
	} else if len(local) > 0 {
		wg.Go(func() { g.copyLocal(ctx, local) })
	}
	var err error
	if len(remote) > 0 {
		err = g.fetch(ctx, cancel, prio, remote)
	}
	wg.Wait()
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

// split says which flights may be served from this disk and which the Source is
// asked for. The same bytes are asked for once; the second place is left for the
// next attempt, which finds them on this disk.
func (g *group) split() (local, remote []*flight) {
next:
	for _, f := range g.todo {
		digest := g.d.tab.Digest(f.chunk)
		if !f.remote {
			if g.d.pres.IsSuspect(f.chunk) {
				local = append(local, f)
				continue
			}
			if o, _ := g.d.c.lookup(&digest); o != nil {
				local = append(local, f)
				continue
			}
		}
		for _, r := range remote {
			if g.d.tab.Digest(r.chunk) == digest {
				continue next
			}
		}
		remote = append(remote, f)
	}
	return local, remote
}

// fetch sends one request and takes what comes.
func (g *group) fetch(ctx context.Context, cancel context.CancelCauseFunc, prio blockdev.Priority, flights []*flight) error {
	d := g.d
	chunks := make([]blockdev.Chunk, len(flights))
	for i, f := range flights {
		chunks[i] = d.tab.Chunk(f.chunk)
	}
	timeout := d.c.cfg.Timeout * 3 / 4
	if prio == blockdev.Prefetch {
		timeout = d.c.cfg.PrefetchIdle
	}
	idle := time.AfterFunc(timeout, func() {
		cancel(fmt.Errorf("the source has delivered nothing for %v: %w", timeout, blockdev.ErrUnavailable))
	})
	defer idle.Stop()

	var returned atomic.Bool
	left := len(flights)
	began, bytes := time.Now(), int64(0)
	g.from = blockdev.FromLocal
	err := d.c.cfg.Source.Fetch(ctx, blockdev.Request{Diff: d.id, Priority: prio, Hops: g.hops, Chunks: chunks, From: &g.from}, func(i int, data []byte) error {
		if returned.Load() {
			return errors.New("delivered after the request had ended")
		}
		if i < 0 || i >= len(flights) {
			return fmt.Errorf("delivered chunk number %d of a request for %d", i, len(flights))
		}
		f := flights[i]
		if f.got {
			return nil
		}
		if !d.tab.Check(f.chunk, data) {
			d.c.stats.corrupt.Add(1)
			return fmt.Errorf("diff %v: chunk %d came with wrong bytes (%d bytes, want %d of %v): %w",
				d.id, f.chunk, len(data), d.tab.Length(f.chunk), d.tab.Digest(f.chunk), blockdev.ErrCorrupt)
		}
		idle.Reset(timeout)
		f.got, f.from = true, g.from
		left--
		if g.owed > 0 {
			g.owed -= int64(len(data))
			d.c.pace.Inflight.Free(int64(len(data)))
		}
		bytes += int64(len(data))
		d.c.stats.fetched(prio, len(data))
		d.c.pace.Gate.Came(&d.reading)
		if prio == blockdev.Prefetch && g.hops == 0 {
			d.c.pace.Rate.Came(len(data))
		}
		if prio == blockdev.Startup {
			d.c.pace.Arrivals.Note(time.Now())
		}
		return g.settle(prio, f, data)
	})
	returned.Store(true)
	if prio == blockdev.Prefetch && g.hops == 0 {
		d.c.pace.Trickle.Note(bytes, time.Since(began))
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case left > 0:
		return fmt.Errorf("the source says that it is done, but %d of %d chunks did not come: %w", left, len(flights), blockdev.ErrUnavailable)
	}
	return nil
}

// settle writes a chunk that has been checked and ends its flight. If it cannot
// be written, those that wait for it get it from memory; a demand request goes
// on, a prefetch request ends.
func (g *group) settle(prio blockdev.Priority, f *flight, data []byte) error {
	u := room.ForPrefetch
	if prio == blockdev.Demand {
		u = room.ForDemand
	}
	err := g.d.store(f.chunk, data, u)
	switch {
	case err == nil:
		g.d.finish(f, nil, nil)
	case prio == blockdev.Demand || g.d.awaited(f):
		g.d.c.stats.notKept.Add(int64(len(data)))
		g.d.finish(f, bytes.Clone(data), nil)
		g.d.c.recent.add(g.d, f)
	default:
		g.d.finish(f, nil, err)
	}
	if prio == blockdev.Demand {
		return nil
	}
	return err
}
