package cache

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

// other adds a second diff, of which the rig's source knows.
func (r *rig) other(seed uint64, size int) (*Diff, []byte) {
	r.t.Helper()
	ix, data := blockdevtest.Diff(seed, size)
	r.mem.PutDiff(ix, data)
	return r.add(ix), padded(data)
}

// TestHungDiffLeavesRoom: a source that does not answer for one diff holds a part of
// what demand requests may have in flight, and never what another diff needs. The
// first diff's bytes come when all of the other's have been read.
func TestHungDiffLeavesRoom(t *testing.T) {
	const most = 4 << 20
	r := newRig(t, 12<<20, func(c *Config) { c.DemandBytes, c.MaxReadAhead = most, 256<<10 })
	good, want := r.other(77, 12<<20)
	open := make(chan struct{})
	var hung atomic.Int64 // bytes in flight
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		if req.Diff == r.d.id {
			n := int64(0)
			for _, c := range req.Chunks {
				n += int64(c.Length)
			}
			hung.Add(n)
			select {
			case <-open:
			case <-ctx.Done(): // of this attempt
			}
			hung.Add(-n)
		}
		return r.mem.Fetch(ctx, req, deliver)
	})
	var wg sync.WaitGroup
	const step = 400_000
	for off := int64(0); off < r.d.Size(); off += step {
		wg.Go(func() { r.checkRead(off, step) })
	}
	r.eventually("all reads of the hung diff wait", func() bool {
		for off := int64(0); off < r.d.Size(); off += step {
			if r.waiters(r.d.tab.At(min(off+step/2, r.d.DiffSize()-1))) < 1 {
				return false
			}
		}
		return true
	})
	for off := int64(0); off < good.Size(); off += step {
		r.check(good, want, off, step)
	}
	if n := hung.Load(); n == 0 || n > most/2+blockdev.MaxChunk {
		t.Errorf("the hung diff has %d bytes in flight, of %d for all", n, most)
	}
	close(open)
	wg.Wait()
	r.quiet()
	if keys := r.demand.Keys(); keys != 0 {
		t.Errorf("%d diffs still hold bytes of demand requests", keys)
	}
}

// TestNothingHeldBetweenAttempts: while a request that has failed waits for its next
// attempt, its bytes are free for others.
func TestNothingHeldBetweenAttempts(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	var down atomic.Bool
	var failed atomic.Int64
	down.Store(true)
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		if down.Load() {
			failed.Add(1)
			return blockdev.ErrUnavailable
		}
		return r.mem.Fetch(ctx, req, deliver)
	})
	var wg sync.WaitGroup
	wg.Go(func() { r.checkRead(0, 4096) })
	r.eventually("an attempt has failed, and holds nothing", func() bool { return failed.Load() > 0 && r.demand.Keys() == 0 })
	down.Store(false)
	wg.Wait()
}

// TestAbandonedRequestIsNotSent: a request that has its turn after everybody has gone
// that waited for it is not sent.
func TestAbandonedRequestIsNotSent(t *testing.T) {
	r := newRig(t, 8<<20, func(c *Config) {
		c.DemandBytes, c.ReadAhead, c.MaxReadAhead = 2<<20, -1, -1
	})
	open := make(chan struct{})
	var asked sync.Map
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		for _, c := range req.Chunks {
			asked.Store(c.Digest, true)
		}
		<-open
		return r.mem.Fetch(ctx, req, deliver)
	})
	var wg sync.WaitGroup
	wg.Go(func() { r.checkRead(0, 1<<20) })
	r.eventually("the first request is under way", func() bool { return r.demand.Keys() == 1 })
	ctx, leave := context.WithCancel(t.Context())
	wg.Go(func() {
		if _, err := r.d.ReadAt(ctx, make([]byte, 1<<20), 6<<20); !errors.Is(err, context.Canceled) {
			t.Errorf("a read whose caller has gone: %v", err)
		}
	})
	second := r.d.tab.At(6 << 20)
	r.awaitWaiters(second, 1)
	leave()
	r.awaitWaiters(second, 0)
	close(open)
	wg.Wait()
	r.quiet()
	if _, sent := asked.Load(r.d.tab.Digest(second)); sent {
		t.Error("a request that nobody waits for was sent")
	}
	r.checkRead(6<<20, 1<<20)
}

// lateMemory says whether it was asked for memory too early.
type lateMemory struct {
	ready *atomic.Bool
	early atomic.Bool
	given []byte
}

func (m *lateMemory) Take(_ context.Context, n int, _ blockdev.Origin) ([]byte, error) {
	if !m.ready.Load() {
		m.early.Store(true)
	}
	m.given = make([]byte, n)
	return m.given, nil
}

func (m *lateMemory) Give() { m.given = nil }

// TestMemoryIsTakenLast: a read asks for memory when the last of its bytes has come,
// also if they cannot be written to the disk.
func TestMemoryIsTakenLast(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"kept": nil, "not kept": func(c *Config) { c.Quota = 1 },
		"in parts": func(c *Config) { c.RequestBytes = 128 << 10 },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 4<<20, nil)
			if change != nil {
				r.close()
				change(&r.cfg)
				r.open()
				r.expect()
			}
			const off, n = 100_000, 1 << 20
			_, last := r.d.tab.Span(off, off+n)
			var ready atomic.Bool
			r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
				return r.mem.Fetch(ctx, req, func(i int, data []byte) error {
					if req.Chunks[i].Digest == r.d.tab.Digest(last-1) {
						ready.Store(true)
					}
					return deliver(i, data)
				})
			})
			m := &lateMemory{ready: &ready}
			if k, err := r.d.Read(t.Context(), off, n, m); k != n || err != nil || !bytes.Equal(m.given, r.want[off:off+n]) {
				t.Errorf("%d bytes, %v, or other bytes", k, err)
			}
			if m.early.Load() {
				t.Error("memory was taken before the bytes had come")
			}
			if keys := r.held.Keys(); keys != 0 {
				t.Errorf("%d diffs hold chunks after the read", keys)
			}
		})
	}
}

// TestUnwrittenIsBounded: what reads hold of chunks that could not be written, while
// they wait for others, is bounded, and all are answered in the end.
func TestUnwrittenIsBounded(t *testing.T) {
	r := newRig(t, 4<<20, nil)
	r.close()
	r.cfg.Quota = 1
	r.open()
	r.expect()
	// Somebody else's reads hold all of it but for one chunk.
	r.held.Take(blockdev.Sum([]byte("another diff")), heldBytes)
	var wg sync.WaitGroup
	for i := range int64(4) {
		wg.Go(func() { r.checkRead(i*4096, 4096) })
	}
	wg.Wait()
	r.held.Give(blockdev.Sum([]byte("another diff")), heldBytes)
	r.checkRead(0, 1<<20)
	if keys := r.held.Keys(); keys != 0 {
		t.Errorf("%d diffs hold chunks", keys)
	}
}
