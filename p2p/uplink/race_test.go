package uplink

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

// forever is fake.hangs of a supernode that never answers.
func forever() <-chan struct{} { return make(chan struct{}) }

// after is fake.hangs of one that answers late.
func after(d time.Duration) func() <-chan struct{} {
	return func() <-chan struct{} {
		ch := make(chan struct{})
		time.AfterFunc(d, func() { close(ch) })
		return ch
	}
}

func haveAll(s []*fake, list []blockdev.Chunk) {
	for _, f := range s {
		for _, c := range list {
			f.chunks[c.Digest] = true
		}
	}
}

func (f *fake) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked
}

// read is one request for all chunks; each must be delivered once. It returns how long
// that took.
func read(t *testing.T, u *Uplink, prio blockdev.Priority, list []blockdev.Chunk) time.Duration {
	t.Helper()
	began := time.Now()
	got := make([]int, len(list))
	if err := u.Fetch(t.Context(), blockdev.Request{Diff: key, Priority: prio, Chunks: list}, func(i int, data []byte) error {
		if blockdev.Sum(data) != list[i].Digest {
			t.Errorf("chunk %d comes with the bytes of another", i)
		}
		got[i]++
		return nil
	}); err != nil {
		t.Error(err)
	}
	for i, n := range got {
		if n != 1 {
			t.Errorf("chunk %d was delivered %d times", i, n)
		}
	}
	return time.Since(began)
}

// TestOwnerHangs: reads that an owner does not answer come from the next supernode, and
// those after them ask that one first, until one of them has found the owner well.
func TestOwnerHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, s := newUplink(t, 2)
		list := chunks(4)
		haveAll(s, list)
		s[0].hangs = forever
		var all sync.WaitGroup
		for range 64 { // many more than may be hedged before anything is known
			all.Go(func() {
				if took := read(t, u, blockdev.Demand, list); took > leastHedge+2*trialLook {
					t.Errorf("a read took %v", took)
				}
			})
		}
		all.Wait()
		asked := s[0].count()
		for range 10 {
			if took := read(t, u, blockdev.Demand, list); took != 0 {
				t.Errorf("a read took %v though the owner is known to hang", took)
			}
		}
		if n := s[0].count(); n != asked {
			t.Errorf("the owner was asked %d times more", n-asked)
		}
		time.Sleep(slowFor)
		for range 10 { // the first of these finds out, the others do not wait for it
			all.Go(func() { read(t, u, blockdev.Demand, list) })
		}
		all.Wait()
		if n := s[0].count(); n != asked+1 {
			t.Errorf("%d requests found out whether the owner still hangs", n-asked)
		}
		s[0].hangs = nil
		time.Sleep(slowFor)
		next := s[1].count()
		for range 10 {
			read(t, u, blockdev.Demand, list)
		}
		if n := s[1].count(); n != next {
			t.Errorf("the owner is well and the next one was asked %d times", n-next)
		}
	})
}

// TestOwnLinkIsFull: where all supernodes take long, since it is this node's link, few
// requests are made twice.
func TestOwnLinkIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, s := newUplink(t, 2)
		list := chunks(1)
		haveAll(s, list)
		s[0].hangs, s[1].hangs = after(5*time.Second), after(5*time.Second)
		var all sync.WaitGroup
		for range 64 {
			all.Go(func() { read(t, u, blockdev.Demand, list) })
		}
		time.Sleep(4 * time.Second)
		if n := s[1].count(); n != maxTrials {
			t.Errorf("%d of 64 requests were made twice, want %d", n, maxTrials)
		}
		all.Wait()
		s[0].hangs = after(leastHedge + leastHedge/2)
		for range 100 {
			read(t, u, blockdev.Demand, list)
		}
		s[1].asked = 0
		read(t, u, blockdev.Demand, list)
		if n := s[1].count(); n != 0 {
			t.Error("what always takes that long is hedged")
		}
	})
}

// TestHangsInTheMiddle: the next supernode is asked for no more than what has not come,
// and what the first one sends all the same is not delivered again.
func TestHangsInTheMiddle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, s := newUplink(t, 2)
		list := chunks(8)
		haveAll(s, list)
		half := &partly{fake: s[0], first: 4, late: leastHedge + time.Second}
		u.replace(t, s[0], half)
		s[1].hangs = after(2 * time.Second)
		read(t, u, blockdev.Demand, list)
		if n := s[1].wanted.Load(); n != 4 {
			t.Errorf("the next one was asked for %d chunks, want 4", n)
		}
	})
}

// partly delivers some chunks at once and the others late.
type partly struct {
	*fake
	first int
	late  time.Duration
}

func (p *partly) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	for i, c := range req.Chunks {
		if i == p.first {
			select {
			case <-time.After(p.late):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err := deliver(i, content[c.Digest]); err != nil {
			return err
		}
	}
	return nil
}

// replace has another supernode in the place of one.
func (u *Uplink) replace(t *testing.T, old, s Supernode) {
	t.Helper()
	nodes := maps.Clone(u.set.Load().nodes)
	for id, have := range nodes {
		if have == old {
			nodes[id] = s
		}
	}
	if err := u.Set(nodes); err != nil {
		t.Error(err)
	}
}

// TestPrefetchIsNotHedged: it is given up where nothing comes, and asked for elsewhere.
func TestPrefetchIsNotHedged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, s := newUplink(t, 2)
		list := chunks(4)
		haveAll(s, list)
		s[0].hangs = forever
		if took := read(t, u, blockdev.Prefetch, list); took != prefetchGiveUp {
			t.Errorf("took %v, want %v", took, prefetchGiveUp)
		}
		// Nobody is left after the second one: it has all the time there is.
		s[1].hangs = after(time.Minute)
		if took := read(t, u, blockdev.Prefetch, list); took != prefetchGiveUp+time.Minute {
			t.Errorf("took %v", took)
		}
	})
}

// TestImageHangs: an image and a document come from the next supernode if the owner gives
// no sign of life, and not if it says that it is at work.
func TestImageHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, ask := range []struct {
			name  string
			hedge time.Duration
			do    func(*Uplink) error
		}{
			{"image", imageHedge, func(u *Uplink) error {
				_, err := u.FetchIndexes(t.Context(), image.Request{Manifest: key})
				return err
			}},
			{"document", documentHedge, func(u *Uplink) error {
				_, err := u.Document(t.Context(), image.DocumentRequest{Ref: "r.io/a:1"})
				return err
			}},
		} {
			u, s := newUplink(t, 2)
			owner, next := s[0], s[1]
			if ask.name == "document" {
				first := u.order(imageKey("r.io/a:1", blockdev.Digest{}), 0)[0].(*fake)
				if first != owner {
					owner, next = next, owner
				}
			}
			owner.hangs = forever
			for i, want := range []time.Duration{ask.hedge, 0} {
				began := time.Now()
				if err := ask.do(u); err != nil {
					t.Errorf("%s: %v", ask.name, err)
				}
				if took := time.Since(began); took != want {
					t.Errorf("%s number %d took %v, want %v", ask.name, i, took, want)
				}
			}
			time.Sleep(slowFor)
			owner.hangs, owner.alive = after(time.Minute), ask.hedge/2
			asked := next.count()
			if err := ask.do(u); err != nil || next.count() != asked {
				t.Errorf("%s: %v, and the next one was asked %d times while the owner is at work", ask.name, err, next.count()-asked)
			}
		}
	})
}

// TestBusy: the next supernode is asked where one has too much to do, and where all have
// they are asked again.
func TestBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, s := newUplink(t, 2)
		s[0].image = fmt.Errorf("no place: %w", wire.ErrBusy)
		req := image.Request{Manifest: key}
		began := time.Now()
		if _, err := u.FetchIndexes(t.Context(), req); err != nil || time.Since(began) != 0 {
			t.Errorf("%v after %v, though the second one is idle", err, time.Since(began))
		}
		var tries atomic.Int64
		s[1].hangs = func() <-chan struct{} {
			if s[1].image = s[0].image; tries.Add(1) == 4 {
				s[1].image = nil
			}
			return nil
		}
		if _, err := u.FetchIndexes(t.Context(), req); err != nil || tries.Load() != 4 {
			t.Errorf("%v, asked %d times", err, tries.Load())
		}
		s[0].image, s[1].image, s[1].hangs = wire.ErrBusy, wire.ErrBusy, nil
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := u.FetchIndexes(ctx, req); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, wire.ErrBusy) {
			t.Errorf("all are busy: %v", err)
		}
	})
}

func TestAway(t *testing.T) {
	u, s := newUplink(t, 2)
	for _, c := range []struct {
		a, b time.Duration
		away bool
	}{{0, 0, false}, {0, time.Hour, false}, {time.Second, time.Hour, false}, {time.Minute, time.Hour, true}} {
		s[0].gone, s[1].gone = c.a, c.b
		if got := u.Away(10 * time.Second); got != c.away {
			t.Errorf("gone for %v and %v: away is %v", c.a, c.b, got)
		}
	}
}
