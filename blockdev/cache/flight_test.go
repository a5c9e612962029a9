package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

// TestOneFlightPerChunk: many readers and a prefetch at once, and every chunk is
// asked for once.
func TestOneFlightPerChunk(t *testing.T) {
	r := newRig(t, 8<<20, func(c *Config) { c.Promote = time.Hour })
	r.mem.Record()
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(3, uint64(g%4)))
			for range 20 {
				off := rng.Int64N(r.d.Size())
				p := make([]byte, min(1+rng.Int64N(400_000), r.d.Size()-off))
				if _, err := r.d.ReadAt(context.Background(), p, off); err != nil || !bytes.Equal(p, r.want[off:off+int64(len(p))]) {
					t.Errorf("read %d at %d: wrong bytes or %v", len(p), off, err)
				}
			}
		})
	}
	wg.Go(func() {
		if err := r.d.Prefetch(context.Background()); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	asked := make(map[int64]int)
	for _, req := range r.mem.Requests() {
		for _, c := range req.Chunks {
			asked[c.Offset]++
		}
	}
	for off, n := range asked {
		if n != 1 {
			t.Errorf("the chunk at %d was asked for %d times", off, n)
		}
	}
	if len(asked) != r.d.tab.Len() || r.present() != r.d.tab.Len() {
		t.Errorf("%d chunks asked for, %d present, of %d", len(asked), r.present(), r.d.tab.Len())
	}
}

// TestNeighboursAndReadAhead: one request takes all that a read misses, and what
// follows within the window.
func TestNeighboursAndReadAhead(t *testing.T) {
	for _, ahead := range []int64{-1, 200_000, 512 << 10} {
		r := newRig(t, 4<<20, func(c *Config) { c.ReadAhead = ahead })
		r.mem.Record()
		const off, n = 300_000, 500_000
		r.checkRead(off, n)
		reqs := r.mem.Requests()
		if len(reqs) != 1 {
			t.Fatalf("read-ahead %d: %d requests", ahead, len(reqs))
		}
		if reqs[0].Priority != blockdev.Demand || reqs[0].Diff != r.ix.DiffID {
			t.Errorf("%+v", reqs[0])
		}
		lo, hi := r.d.tab.Span(off, off+n)
		first, last := reqs[0].Chunks[0], reqs[0].Chunks[len(reqs[0].Chunks)-1]
		if first.Offset != r.d.tab.Start(lo) {
			t.Errorf("first chunk at %d, want %d", first.Offset, r.d.tab.Start(lo))
		}
		end := last.Offset + int64(last.Length)
		least := r.d.tab.Start(hi)
		if end < least || end > least+max(ahead, 0) {
			t.Errorf("read-ahead %d: the request ends %d bytes behind the read's chunks", ahead, end-least)
		}
		if ahead > blockdev.MaxChunk && end == least {
			t.Errorf("read-ahead %d: nothing was read ahead", ahead)
		}
	}
}

// TestReaderDoesNotWaitForReadAhead: the read returns while the rest of its
// request is still to come, and the rest comes.
func TestReaderDoesNotWaitForReadAhead(t *testing.T) {
	r := newRig(t, 4<<20, nil)
	release := make(chan struct{})
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		for i, c := range req.Chunks {
			if i == 1 {
				<-release
			}
			if err := deliver(i, r.data[c.Offset:][:c.Length]); err != nil {
				return err
			}
		}
		return nil
	})
	r.checkRead(0, 100)
	d := r.d
	d.flights.mu.Lock()
	ahead := len(d.flights.m)
	d.flights.mu.Unlock()
	if ahead == 0 {
		t.Fatal("nothing is read ahead")
	}
	close(release)
	r.checkRead(d.tab.Start(1), 10)
}

// TestCancelEndsTheWaitOnly: the reader that started the flight leaves; the one
// that joined gets its bytes.
func TestCancelEndsTheWaitOnly(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	asked := make(chan struct{})
	release := make(chan struct{})
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		close(asked)
		select {
		case <-release:
		case <-ctx.Done():
			return ctx.Err()
		}
		return r.mem.Fetch(ctx, req, deliver)
	})
	ctx, cancel := context.WithCancelCause(context.Background())
	first := make(chan error)
	go func() {
		_, err := r.d.ReadAt(ctx, make([]byte, 10), 5)
		first <- err
	}()
	<-asked
	second := make(chan error)
	go func() {
		p := make([]byte, 10)
		_, err := r.d.ReadAt(context.Background(), p, 5)
		if err == nil && !bytes.Equal(p, r.want[5:15]) {
			err = errors.New("wrong bytes")
		}
		second <- err
	}()
	r.awaitWaiters(0, 2)
	why := errors.New("the reader was interrupted")
	cancel(why)
	if err := <-first; !errors.Is(err, why) {
		t.Errorf("first reader: %v", err)
	}
	close(release)
	if err := <-second; err != nil {
		t.Errorf("second reader: %v", err)
	}
	if n := r.log.count("a read has failed"); n != 0 {
		t.Error("a reader that left by itself is logged as a failure")
	}
}

// awaitWaiters returns when the flight of a chunk has n readers.
func (r *rig) awaitWaiters(chunk, n int) {
	r.t.Helper()
	r.eventually(fmt.Sprintf("%d readers wait for chunk %d", n, chunk), func() bool { return r.waiters(chunk) == n })
}

// waiters is how many reads wait for a chunk; -1: it is not in flight.
func (r *rig) waiters(chunk int) int {
	r.d.flights.mu.Lock()
	defer r.d.flights.mu.Unlock()
	if f := r.d.flights.m[chunk]; f != nil {
		return f.waiters
	}
	return -1
}

// TestPromote: a source that serves demand and starves prefetch does not hold up
// a read that wants what prefetch has asked for.
func TestPromote(t *testing.T) {
	r := newRig(t, 3<<20, func(c *Config) { c.Promote = time.Millisecond })
	asked := make(chan struct{}, 100)
	var open atomic.Bool
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		if req.Priority == blockdev.Prefetch && !open.Load() {
			asked <- struct{}{}
			<-ctx.Done()
			return ctx.Err()
		}
		return r.mem.Fetch(ctx, req, deliver)
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.d.Prefetch(ctx) }()
	<-asked
	r.checkRead(200_000, 1000)
	r.checkRead(0, 1<<20)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("prefetch: %v", err)
	}
	open.Store(true)
	r.prefetch()
	r.present()
}

// TestPrefetchSurvivesPromotion: a prefetch whose requests are taken from it by
// readers still gets everything.
func TestPrefetchSurvivesPromotion(t *testing.T) {
	r := newRig(t, 6<<20, func(c *Config) { c.Promote = time.Nanosecond })
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(9, uint64(g)))
			for range 40 {
				off := rng.Int64N(r.d.Size() - 1000)
				p := make([]byte, 1000)
				if _, err := r.d.ReadAt(context.Background(), p, off); err != nil || !bytes.Equal(p, r.want[off:off+1000]) {
					t.Errorf("read at %d: wrong bytes or %v", off, err)
				}
			}
		})
	}
	wg.Go(func() {
		if err := r.d.Prefetch(context.Background()); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	if n := r.present(); n != r.d.tab.Len() {
		t.Errorf("%d of %d chunks", n, r.d.tab.Len())
	}
}

// TestPrefetchGivesWay: no prefetch request is sent while a demand read waits,
// until GiveWay is over; then it goes on all the same.
func TestPrefetchGivesWay(t *testing.T) {
	r := newRig(t, 3<<20, func(c *Config) { c.GiveWay = time.Hour })
	other, data := blockdevtest.Diff(4, 1<<20)
	r.mem.PutDiff(other, data)
	d2 := r.add(other)
	asked, release := make(chan struct{}), make(chan struct{})
	var early atomic.Bool
	var over atomic.Bool
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		if req.Priority == blockdev.Demand {
			close(asked)
			<-release
		} else if !over.Load() {
			early.Store(true)
		}
		return r.mem.Fetch(ctx, req, deliver)
	})
	read := make(chan error)
	go func() {
		_, err := r.d.ReadAt(context.Background(), make([]byte, 10), 0)
		read <- err
	}()
	<-asked
	done := make(chan error)
	go func() { done <- d2.Prefetch(context.Background()) }()
	r.eventually("prefetch is under way", func() bool { return len(d2.prefetching) == 1 })
	over.Store(true)
	close(release)
	if err := <-read; err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if early.Load() {
		t.Error("a prefetch request was sent while a demand read was in flight")
	}
}

func TestPrefetchIsNotStarved(t *testing.T) {
	r := newRig(t, 3<<20, func(c *Config) { c.GiveWay = time.Millisecond })
	other, data := blockdevtest.Diff(4, 1<<20)
	r.mem.PutDiff(other, data)
	d2 := r.add(other)
	asked := make(chan struct{})
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		if req.Priority == blockdev.Demand {
			close(asked)
			<-ctx.Done()
			return ctx.Err()
		}
		return r.mem.Fetch(ctx, req, deliver)
	})
	ctx, cancel := context.WithCancel(context.Background())
	read := make(chan error)
	go func() {
		_, err := r.d.ReadAt(ctx, make([]byte, 10), 0)
		read <- err
	}()
	<-asked
	if err := d2.Prefetch(context.Background()); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-read; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// What is under way is bounded chunk by chunk: a request that has come but for one
// chunk leaves room for the next ones.
func TestPrefetchWindowIsBounded(t *testing.T) {
	const size = 3 << 20
	r := newRig(t, 12<<20, func(c *Config) { c.Inflight = func() int64 { return size } })
	var now, most, requests atomic.Int64
	stuck, done := make(chan struct{}), make(chan struct{})
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		first := requests.Add(1) == 1
		for _, c := range req.Chunks {
			now.Add(int64(c.Length))
		}
		for n, m := now.Load(), most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		return r.mem.Fetch(ctx, req, func(i int, data []byte) error {
			if first && i == len(req.Chunks)-1 {
				close(stuck)
				<-done
			}
			now.Add(-int64(len(data)))
			return deliver(i, data)
		})
	})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.prefetch()
	}()
	<-stuck
	for requests.Load() < 12 { // of 16 or more
		runtime.Gosched()
	}
	close(done)
	<-ended
	if m := most.Load(); m > size+2*blockdev.MaxChunk {
		t.Errorf("%d bytes were under way, at most %d are allowed", m, size)
	}
}

func TestDemandBytesAreBounded(t *testing.T) {
	r := newRig(t, 12<<20, func(c *Config) { c.DemandBytes = 2 << 20; c.MaxReadAhead = 256 << 10 })
	var now, most atomic.Int64
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		var size int64
		for _, c := range req.Chunks {
			size += int64(c.Length)
		}
		n := now.Add(size)
		defer now.Add(-size)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		return r.mem.Fetch(ctx, req, deliver)
	})
	var wg sync.WaitGroup
	for off := int64(0); off < r.d.Size(); off += 400_000 {
		wg.Go(func() {
			p := make([]byte, min(400_000, r.d.Size()-off))
			if _, err := r.d.ReadAt(context.Background(), p, off); err != nil || !bytes.Equal(p, r.want[off:off+int64(len(p))]) {
				t.Errorf("read at %d: wrong bytes or %v", off, err)
			}
		})
	}
	wg.Wait()
	if m := most.Load(); m > 2<<20 {
		t.Errorf("%d bytes of demand requests at once", m)
	}
}

func TestPrefetchCancel(t *testing.T) {
	r := newRig(t, 8<<20, nil)
	ctx, cancel := context.WithCancel(context.Background())
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		cancel()
		return r.mem.Fetch(ctx, req, deliver)
	})
	if err := r.d.Prefetch(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled prefetch: %v", err)
	}
	if r.d.Complete() {
		t.Error("complete")
	}
	r.present()
	r.prefetch() // goes on; the old ctx is of no importance
}

func TestTwoPrefetchesShareTheWork(t *testing.T) {
	r := newRig(t, 4<<20, nil)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := r.d.Prefetch(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if s := r.Stats(); s.PrefetchBytes != r.d.DiffSize() {
		t.Errorf("%d bytes fetched of %d", s.PrefetchBytes, r.d.DiffSize())
	}
}

// TestRemoveWhileInUse: readers, prefetchers, Add and Remove of the same diffs all
// at once. Every read is right or ends with ErrRemoved.
func TestRemoveWhileInUse(t *testing.T) {
	r := newRig(t, 1<<20, func(c *Config) { c.SyncInterval = time.Millisecond; c.SyncBytes = 1 << 18 })
	enc := encode(t, r.ix)
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(5, uint64(g)))
			for ctx.Err() == nil {
				d, err := r.Add(context.Background(), enc)
				if err != nil {
					t.Errorf("add: %v", err)
					return
				}
				if g == 0 {
					if err := d.Prefetch(context.Background()); err != nil && !errors.Is(err, ErrRemoved) {
						t.Errorf("prefetch: %v", err)
					}
					continue
				}
				off := rng.Int64N(1<<20 - 5000)
				p := make([]byte, 5000)
				_, err = d.ReadAt(context.Background(), p, off)
				if err != nil && !errors.Is(err, ErrRemoved) {
					t.Errorf("read: %v", err)
				}
				if err == nil && !bytes.Equal(p, r.want[off:off+5000]) {
					t.Errorf("read at %d: wrong bytes", off)
				}
				d.Drop(off, 5000)
			}
		})
	}
	for range 100 {
		if err := r.Remove(context.Background(), r.ix.DiffID); err != nil {
			t.Error(err)
		}
	}
	stop()
	wg.Wait()
	if n := r.log.count("cannot sync") + r.log.count("damaged"); n != 0 {
		t.Errorf("%d log lines about damage; log:\n%s", n, r.log.b.String())
	}
}
