package swarm

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/p2p/wire"
)

// batch is one request to one peer, or to the supernode.
type batch struct {
	f      *search
	target route.Target
	chunks []int // numbers in the search
	ctx    context.Context
	cancel context.CancelCauseFunc
	began  time.Time

	// Under search.mu:
	client *pooled
	last   time.Time     // when something came last
	took   time.Duration // until the first chunk came; 0: none has
	hedged bool
	done   []bool // chunks that came, or came back
}

// start sends the request and returns at once.
func (b *batch) start() {
	f := b.f
	b.began = time.Now()
	b.last = b.began
	b.done = make([]bool, len(b.chunks))
	b.ctx, b.cancel = context.WithCancelCause(f.ctx)
	f.mu.Lock()
	for _, i := range b.chunks {
		f.want[i].flying++
	}
	f.live[b] = struct{}{}
	f.mu.Unlock()
	go func() {
		defer b.cancel(nil)
		b.finish(b.fetch())
	}()
}

func (b *batch) fetch() error {
	req := blockdev.Request{Diff: b.f.req.Diff, Priority: b.f.req.Priority, Hops: b.f.req.Hops, Chunks: make([]blockdev.Chunk, len(b.chunks))}
	for k, i := range b.chunks {
		req.Chunks[k] = b.f.req.Chunks[i]
	}
	s := b.f.s
	if b.target.Kind == route.Supernode {
		return s.Supernode.Fetch(b.ctx, req, b.deliver)
	}
	c, err := s.pool.get(b.target.ID)
	if err != nil {
		return err
	}
	defer s.pool.put(c)
	b.f.mu.Lock()
	b.client = c
	b.f.mu.Unlock()
	return c.FetchVia(b.ctx, exchange.Via{Group: b.f.g.id, Hops: b.target.Hops, Failed: b.failed}, req, b.deliver)
}

// connecting returns since when there has been an attempt to connect to the peer; zero:
// there is a connection. search.mu is held.
func (b *batch) connecting() time.Time {
	if b.client == nil {
		return b.began
	}
	if gone := b.client.Gone(); gone > 0 {
		return time.Now().Add(-gone)
	}
	return time.Time{}
}

// deliver is the batch's blockdev.Deliver. What it does with the bytes (it checks
// and writes them) is done without the search's lock, so that others are hedged and
// given up in time.
func (b *batch) deliver(k int, data []byte) error {
	f := b.f
	f.turn.Lock()
	defer f.turn.Unlock()
	wanted, err := b.arrived(k, len(data))
	if err != nil {
		return err
	}
	if !wanted {
		// Nobody else looks at it, and nil means that it is right.
		return f.req.Chunks[b.chunks[k]].Check(data)
	}
	from := blockdev.FromPeer
	if b.target.Kind == route.Supernode {
		from = blockdev.FromSupernode
	}
	f.req.Comes(from)
	if err := f.deliver(b.chunks[k], data); err != nil {
		if !errors.Is(err, blockdev.ErrCorrupt) {
			f.mu.Lock()
			f.err = err
			f.mu.Unlock()
			f.wake()
		}
		return err
	}
	b.delivered(k, len(data))
	return nil
}

// arrived notes that bytes of a chunk have come, and says whether they are wanted.
func (b *batch) arrived(k, n int) (wanted bool, err error) {
	f := b.f
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	b.last = now
	if b.client != nil {
		b.client.heard.Store(int64(f.s.now()))
	}
	if b.took == 0 {
		b.took = now.Sub(b.began)
	}
	if f.over {
		return false, context.Canceled
	}
	w := &f.want[b.chunks[k]]
	if !w.got {
		return true, nil
	}
	b.done[k] = true
	w.flying--
	f.s.metrics.twice.Add(float64(n))
	return false, nil
}

// delivered notes that a chunk was right and has been taken.
func (b *batch) delivered(k, n int) {
	f := b.f
	f.mu.Lock()
	defer f.mu.Unlock()
	b.last = time.Now() // a slow disk here is not the peer's fault
	w := &f.want[b.chunks[k]]
	b.done[k] = true
	w.got = true
	w.flying--
	if f.left--; f.left == 0 {
		f.wake()
	}
	s := f.s
	s.report(f.g, &w.ask, b.target, route.OK, b.took, n, nil)
	if b.target.Kind == route.Peer {
		s.metrics.peer[s.zone(f.g, b.target)].Add(float64(n))
		s.well(b.target)
	} else {
		s.metrics.supernode.Add(float64(n))
	}
}

// failed takes a chunk that the peer refuses.
func (b *batch) failed(k int, err error) {
	b.f.mu.Lock()
	b.last = time.Now()
	b.f.mu.Unlock()
	b.giveBack([]int{k}, outcome(err), err)
}

// finish gives back what did not come.
func (b *batch) finish(err error) {
	f := b.f
	if err == nil {
		err = blockdev.ErrUnavailable
	}
	o := outcome(err)
	switch cause := context.Cause(b.ctx); {
	case errors.Is(cause, errSlow):
		o, err = route.Slow, cause
	case errors.Is(cause, errConnecting):
		o, err = route.Busy, cause // it may be a good one; the dial says so, or not
	}
	f.mu.Lock()
	var owed []int
	for k, done := range b.done {
		if !done {
			owed = append(owed, k)
		}
	}
	delete(f.live, b)
	over := f.over || f.err != nil // this node's own disk, perhaps
	f.mu.Unlock()
	if over || f.ctx.Err() != nil {
		return // the search is over, nobody is to blame
	}
	b.giveBack(owed, o, err)
}

// giveBack reports that the chunks did not come and returns them to the search.
func (b *batch) giveBack(ks []int, o route.Outcome, err error) {
	if len(ks) == 0 {
		return
	}
	f := b.f
	for _, k := range ks {
		f.s.report(f.g, &f.want[b.chunks[k]].ask, b.target, o, time.Since(b.began), 0, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, k := range ks {
		w := &f.want[b.chunks[k]]
		b.done[k] = true
		w.flying--
		w.err = err
		if !w.got && w.flying == 0 {
			f.back = append(f.back, b.chunks[k])
		}
	}
	slices.Sort(f.back)
	f.wake()
}

// outcome is what route is told of an error.
func outcome(err error) route.Outcome {
	var remote *wire.RemoteError
	switch {
	case errors.Is(err, wire.ErrBusy):
		return route.Busy
	case errors.As(err, &remote):
		return route.Missing // it lives, and says that it cannot
	case errors.Is(err, blockdev.ErrCorrupt):
		return route.Corrupt
	}
	return route.Dead
}
