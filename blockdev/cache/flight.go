package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/prefetch"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
)

const (
	firstBackoff = 20 * time.Millisecond
	lastBackoff  = time.Second
)

// errPromoted ends a request of lower priority of which a demand read has waited too
// long. It never reaches a caller.
var errPromoted = errors.New("asked for again with demand priority")

// flights is what is under way for one diff, and its waiters.
type flights struct {
	*local
	reading prefetch.Reads // demand reads that wait

	// life ends with Remove or Close. It is kept here because flights belong to
	// the diff and to no caller.
	life context.Context
	kill context.CancelCauseFunc
	wg   sync.WaitGroup // groups and prefetches; counted up under mu

	mu   sync.Mutex
	gone error // why there will be no more flights
	m    map[int]*flight
	seq  prefetch.Sequences
}

func newFlights(l *local) *flights {
	fs := &flights{local: l, m: make(map[int]*flight)}
	fs.life, fs.kill = context.WithCancelCause(context.Background())
	return fs
}

// enter counts the caller in, for leave to count it out, and returns a context that ends
// with the diff; it fails when the diff is no more.
func (fs *flights) enter(parent context.Context) (ctx context.Context, leave func(), err error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.gone != nil {
		return nil, nil, fs.gone
	}
	fs.wg.Add(1)
	ctx, cancel := context.WithCancelCause(parent)
	stop := context.AfterFunc(fs.life, func() { cancel(context.Cause(fs.life)) })
	return ctx, func() {
		stop()
		cancel(nil)
		fs.wg.Done()
	}, nil
}

// why is why the diff's files are closed.
func (fs *flights) why() error {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.gone != nil {
		return fs.gone
	}
	return os.ErrClosed
}

// stop ends all flights with why, and returns when they and all that has entered are over.
func (fs *flights) stop(why error) {
	fs.mu.Lock()
	if fs.gone == nil {
		fs.gone = why
	}
	fs.mu.Unlock()
	fs.kill(why)
	fs.wg.Wait()
}

// get returns the flight of a chunk; nil: there is none.
func (fs *flights) get(chunk int) *flight {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.m[chunk]
}

// flight is the one attempt under way to get a missing chunk.
type flight struct {
	chunk   int
	group   *group
	waiters int           // demand reads that wait; flights.mu
	over    bool          // flights.mu
	done    chan struct{} // closed after mem, from and err are set
	// mem holds the bytes if they could not be written, and then the flight stays
	// listed for a while (recent); otherwise they are in the data file, unless err
	// says why they are not.
	mem    []byte
	from   blockdev.Origin // of the bytes
	err    error
	remote bool // copying it from this disk has failed; used by the group only
}

// group is the flights that go into one request, and its retries.
type group struct {
	fs   *flights
	todo []*flight
	hops int // of the request of another node that it is for; 0: this node's own
	// parent ends the group: the diff's life, or what called Prefetch.
	parent context.Context
	// release is called once, when the group ends or is a prefetch no longer.
	release func(error)
	// owed is how many bytes of prefetch.Inflight the group has still. Used by attempts, one
	// at a time.
	owed int64
	from blockdev.Origin // of the chunk that the Source delivers

	// Under flights.mu:
	prio     blockdev.Priority
	promoted bool
	cancel   context.CancelCauseFunc // of the attempt under way
	lastErr  error
}

// finish ends a flight; only the first call counts.
func (fs *flights) finish(f *flight, mem []byte, err error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if f.over {
		return
	}
	f.over, f.mem, f.err = true, mem, err
	if mem == nil && fs.m[f.chunk] == f {
		delete(fs.m, f.chunk)
	}
	close(f.done)
}

// unlist takes a flight that is over off the list.
func (fs *flights) unlist(f *flight) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.m[f.chunk] == f {
		delete(fs.m, f.chunk)
	}
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

func (fs *flights) awaited(f *flight) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return f.waiters > 0
}

// run gets the group's chunks. A demand group tries again until it has them or
// nobody waits; any other tries once.
func (g *group) run() {
	defer g.fs.wg.Done()
	err := g.get()
	g.end(err)
	g.release(err)
}

func (g *group) get() error {
	d := g.fs
	for try := 0; ; try++ {
		err := g.bounded()
		if g.compact(); len(g.todo) == 0 {
			return nil
		}
		if d.life.Err() != nil {
			return context.Cause(d.life)
		}
		if g.promote() {
			// No read waits for those that are left out here.
			if g.keepAwaited(errPromoted); len(g.todo) == 0 {
				return nil // the reads that hurried it have left since
			}
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
		select {
		case <-time.After(min(firstBackoff<<min(try, 16), lastBackoff)):
		case <-d.life.Done():
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
		size += int64(g.fs.tab.Length(f.chunk))
	}
	waited := g.fs.c.demand.Take(g.fs.id, size)
	defer g.fs.c.demand.Give(g.fs.id, size)
	if g.fs.life.Err() != nil {
		return context.Cause(g.fs.life)
	}
	if waited && !slices.ContainsFunc(g.todo, g.fs.awaited) {
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
	g.fs.mu.Lock()
	now := g.promoted && g.prio != blockdev.Demand
	if now {
		g.prio = blockdev.Demand
		g.parent = g.fs.life
	}
	g.fs.mu.Unlock()
	if now {
		g.release(nil)
		g.release = func(error) {}
	}
	return now
}

// hurry is called by a demand read that waits for the group.
func (g *group) hurry() {
	g.fs.mu.Lock()
	defer g.fs.mu.Unlock()
	if g.prio != blockdev.Demand && !g.promoted {
		g.promoted = true
		if g.cancel != nil {
			g.cancel(errPromoted)
		}
	}
}

// compact takes the flights that are over out of todo.
func (g *group) compact() {
	g.fs.mu.Lock()
	defer g.fs.mu.Unlock()
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
		if !g.fs.awaited(f) {
			g.fs.finish(f, nil, err)
		}
	}
	g.compact()
}

func (g *group) end(err error) {
	if err == nil {
		return
	}
	for _, f := range g.todo {
		g.fs.finish(f, nil, err)
	}
}

// attempt tries to get all of todo: from this disk what is there, in one
// request to the Source what is not. What it got is over when it returns. Nil
// means that nothing stands in the way of going on with the rest.
func (g *group) attempt() error {
	ctx, cancel := context.WithCancelCause(g.parent)
	defer cancel(nil)
	g.fs.mu.Lock()
	g.cancel = cancel
	if g.promoted && g.prio != blockdev.Demand {
		cancel(errPromoted)
	}
	prio := g.prio
	g.fs.mu.Unlock()

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
		digest := g.fs.tab.Digest(f.chunk)
		if !f.remote {
			if g.fs.pres.IsSuspect(f.chunk) {
				local = append(local, f)
				continue
			}
			if o, _ := g.fs.c.lookup(&digest); o != nil {
				local = append(local, f)
				continue
			}
		}
		for _, r := range remote {
			if g.fs.tab.Digest(r.chunk) == digest {
				continue next
			}
		}
		remote = append(remote, f)
	}
	return local, remote
}

// fetch sends one request and takes what comes.
func (g *group) fetch(ctx context.Context, cancel context.CancelCauseFunc, prio blockdev.Priority, flights []*flight) error {
	d, c := g.fs, g.fs.c
	chunks := make([]blockdev.Chunk, len(flights))
	for i, f := range flights {
		chunks[i] = d.tab.Chunk(f.chunk)
	}
	timeout := c.cfg.Timeout * 3 / 4
	if prio == blockdev.Prefetch {
		timeout = c.cfg.PrefetchIdle
	}
	began, bytes := time.Now(), int64(0)
	g.from = blockdev.FromLocal
	err := c.request(ctx, cancel, blockdev.Request{Diff: d.id, Priority: prio, Hops: g.hops, Chunks: chunks, From: &g.from}, timeout, func(i int, data []byte) error {
		f := flights[i]
		f.from = g.from
		if g.owed > 0 {
			g.owed -= int64(len(data))
			c.pace.Inflight.Free(int64(len(data)))
		}
		bytes += int64(len(data))
		c.stats.fetched(prio, len(data))
		c.pace.Gate.Came(&d.reading)
		if prio == blockdev.Prefetch && g.hops == 0 {
			c.pace.Rate.Came(len(data))
		}
		if prio == blockdev.Startup {
			c.pace.Arrivals.Note(time.Now())
		}
		return g.settle(prio, f, data)
	})
	if prio == blockdev.Prefetch && g.hops == 0 {
		c.pace.Trickle.Note(bytes, time.Since(began))
	}
	return err
}

// settle writes a chunk that has been checked and ends its flight. If it cannot
// be written, those that wait for it get it from memory; a demand request goes
// on, a prefetch request ends.
func (g *group) settle(prio blockdev.Priority, f *flight, data []byte) error {
	u := room.ForPrefetch
	if prio == blockdev.Demand {
		u = room.ForDemand
	}
	err := g.fs.store(f.chunk, data, u)
	switch {
	case err == nil:
		g.fs.finish(f, nil, nil)
	case prio == blockdev.Demand || g.fs.awaited(f):
		g.fs.c.stats.notKept.Add(int64(len(data)))
		g.fs.finish(f, bytes.Clone(data), nil)
		g.fs.c.recent.add(g.fs.local, len(data), func() { g.fs.unlist(f) })
	default:
		g.fs.finish(f, nil, err)
	}
	if prio == blockdev.Demand {
		return nil
	}
	return err
}
