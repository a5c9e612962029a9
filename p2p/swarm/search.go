package swarm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/route"
)

// Fetch implements blockdev.Source. Its error, if there is one, is what the
// supernode said about chunks that no peer has.
func (s *Swarm) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	g := s.group(req.Diff)
	if g == nil && req.Priority == blockdev.Prefetch && req.Hops == 0 {
		g = s.awaitGroup(ctx, req.Diff)
	}
	if g == nil || len(req.Chunks) == 0 {
		return s.Supernode.Fetch(ctx, req, func(i int, data []byte) error {
			req.Comes(blockdev.FromSupernode)
			err := deliver(i, data)
			if err == nil {
				s.metrics.supernode.Add(float64(len(data)))
			}
			return err
		})
	}
	f := &search{
		s: s, g: g, req: req, deliver: deliver,
		want: make([]want, len(req.Chunks)), left: len(req.Chunks),
		changed: make(chan struct{}, 1), live: make(map[*batch]struct{}),
	}
	f.req.Chunks = append([]blockdev.Chunk(nil), req.Chunks...) // batches may outlive this call
	f.ctx, f.cancel = context.WithCancel(ctx)
	defer f.end()
	return f.run(ctx)
}

// search is one call of Fetch. One goroutine, run's, decides; each batch has one
// of its own, which sends a request and takes the answer.
type search struct {
	s       *Swarm
	g       *group
	req     blockdev.Request
	deliver blockdev.Deliver
	ctx     context.Context // ends with the search
	cancel  context.CancelFunc
	changed chan struct{} // capacity 1: there is something in back, or it is over

	// Only run's goroutine:
	waiting []int // chunks of which all peers were busy
	until   time.Time
	dead    int // chunks that nobody has

	turn sync.Mutex // held while Deliver runs: one call at a time; taken before mu

	mu   sync.Mutex // for what follows; never held across I/O
	want []want
	live map[*batch]struct{}
	left int   // chunks that have not come
	back []int // chunks that came back from a batch, to be asked for elsewhere
	err  error // of Deliver: the caller's own
	over bool
}

// want is one chunk. Its Ask is guarded by route; the rest is under search.mu.
type want struct {
	ask    route.Ask
	got    bool
	flying int   // batches that have it
	err    error // why the last one did not get it
}

func (f *search) end() {
	f.cancel()
	f.turn.Lock() // a Deliver under way ends first
	defer f.turn.Unlock()
	f.mu.Lock()
	f.over = true // whatever comes now is not delivered
	f.mu.Unlock()
}

func (f *search) demand() bool { return f.req.Priority == blockdev.Demand }

func (f *search) run(ctx context.Context) error {
	all := make([]int, len(f.want))
	for i := range all {
		all[i] = i
		f.want[i].ask = route.NewAsk(f.req.Chunks[i].Digest, f.req.Priority, f.req.Hops)
	}
	f.ask(all)
	timer := time.NewTimer(f.patience(time.Now()))
	defer timer.Stop()
	for {
		select {
		case <-f.changed:
		case <-timer.C:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), context.Cause(ctx))
		}
		f.mu.Lock()
		left, back, err := f.left, f.back, f.err
		f.back = nil
		f.mu.Unlock()
		if err != nil || left == 0 {
			return err
		}
		now := time.Now()
		if len(f.waiting) > 0 && !now.Before(f.until) {
			back, f.waiting = append(back, f.waiting...), nil
		}
		f.ask(back)
		if f.dead > 0 {
			if err := f.failed(); err != nil {
				return err
			}
		}
		timer.Reset(f.patience(now))
	}
}

// failed returns the reason if all that has not come is dead.
func (f *search) failed() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left > f.dead {
		return nil
	}
	for i := range f.want {
		if w := &f.want[i]; !w.got {
			err := w.err
			if err == nil {
				err = blockdev.ErrUnavailable
			}
			return fmt.Errorf("%d of %d chunks did not come, the first: %w", f.left, len(f.want), err)
		}
	}
	return nil
}

// ask sends the chunks to the machines that route chooses.
func (f *search) ask(chunks []int) {
	if len(chunks) == 0 {
		return
	}
	now := time.Now()
	batches := make(map[batchKey]*batch, 4)
	for _, i := range chunks {
		w := &f.want[i]
		f.mu.Lock()
		skip := w.got || w.flying > 0
		f.mu.Unlock()
		if skip {
			continue
		}
		t := f.g.Next(&w.ask, f.s.now())
		switch t.Kind {
		case route.Later:
			if at := now.Add(t.Wait); len(f.waiting) == 0 || at.Before(f.until) {
				f.until = at
			}
			f.waiting = append(f.waiting, i)
		case route.Nobody:
			f.dead++
		default:
			f.add(batches, t, i)
		}
	}
	f.send(batches)
}

// batchKey is what chunks of one batch have in common.
type batchKey struct {
	index int // of the target
	hops  int
}

func (f *search) add(batches map[batchKey]*batch, t route.Target, i int) {
	b := batches[batchKey{t.Index, t.Hops}]
	if b == nil {
		b = &batch{f: f, target: t}
		batches[batchKey{t.Index, t.Hops}] = b
	}
	b.chunks = append(b.chunks, i)
}

// send starts batches. A peer that has failed, and was well never since, is asked
// together with somebody else: nobody waits to see whether it is back.
func (f *search) send(batches map[batchKey]*batch) {
	for _, b := range batches {
		b.start()
		if b.target.Kind == route.Peer && f.demand() && f.s.book.Doubtful(b.target.ID) {
			f.mu.Lock()
			b.hedged = true
			f.mu.Unlock()
			f.hedge(b, true)
		}
	}
}

// patience hedges and gives up what has been waited for too long, and returns how
// long to wait before the next look.
func (f *search) patience(now time.Time) time.Duration {
	hedge, giveUp := f.s.book.Patience(f.demand())
	next := now.Add(time.Hour)
	if len(f.waiting) > 0 {
		next = f.until
	}
	sooner := func(t time.Time) {
		if t.Before(next) {
			next = t
		}
	}
	var slow []*batch
	f.mu.Lock()
	for b := range f.live {
		if b.target.Kind != route.Peer {
			continue // there is nobody behind the supernode
		}
		end := b.last.Add(giveUp)
		if !f.demand() && b.client != nil {
			end = waitUntil(b.last, f.s.began.Add(time.Duration(b.client.heard.Load())), giveUp)
		}
		if since := b.connecting(); !since.IsZero() {
			// Connecting takes some round trips and much arithmetic, more so
			// where many connect at once.
			if f.demand() {
				end = since.Add(connectDemand)
			} else {
				end = b.last.Add(max(giveUp, dialPeer))
			}
		}
		if !now.Before(end) {
			if b.connecting().IsZero() {
				b.cancel(errSlow)
			} else {
				b.cancel(errConnecting)
			}
			continue
		}
		sooner(end)
		if hedge == 0 || b.hedged {
			continue
		}
		if at := b.last.Add(hedge); now.Before(at) {
			sooner(at)
		} else {
			b.hedged = true
			slow = append(slow, b)
		}
	}
	f.mu.Unlock()
	for _, b := range slow {
		f.hedge(b, false)
	}
	return max(time.Until(next), time.Millisecond/4)
}

// waitUntil is when a prefetch is given up of which something came last, by a peer that
// was heard since. A peer that sends other chunks is well, and this one may be on its way
// through many nodes with full links, which to ask for it elsewhere would fill even
// more. But somebody may also keep one chunk back for ever.
func waitUntil(last, heard time.Time, giveUp time.Duration) time.Time {
	end := last.Add(giveUp)
	if later := heard.Add(giveUp); later.After(end) {
		end = later
	}
	if most := last.Add(max(giveUp, keptBack)); end.After(most) {
		end = most
	}
	return end
}

// keptBack is how long a prefetch waits for a chunk while its peer sends others.
const keptBack = 45 * time.Second

// connectDemand is how long demand reads wait for a connection to a peer, from when it was
// asked for first: those that come later pay nothing for a peer that does not answer.
const connectDemand = 150 * time.Millisecond

// Why a batch was given up.
var (
	errSlow       = errors.New("no answer within the usual time")
	errConnecting = errors.New("still connecting")
)

// hedge asks somebody else for what a slow batch still owes, or, with doubt, one to a
// peer that may not answer: that is for no more than it takes to find out.
func (f *search) hedge(b *batch, doubt bool) {
	batches := make(map[batchKey]*batch, 4)
	for _, i := range b.chunks {
		w := &f.want[i]
		f.mu.Lock()
		skip := w.got || w.flying != 1 && !doubt
		f.mu.Unlock()
		if skip || !doubt && !f.s.book.Hedge(int(f.req.Chunks[i].Length)) {
			continue
		}
		if t := f.g.Next(&w.ask, f.s.now()); t.Kind == route.Peer || t.Kind == route.Supernode {
			f.s.metrics.hedges.Inc()
			f.add(batches, t, i)
		}
	}
	f.send(batches)
}

// wake has run look at what has changed.
func (f *search) wake() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}
