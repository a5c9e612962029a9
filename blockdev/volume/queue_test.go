package volume

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/fusefs"
)

// fakeDiff is a diff of which only the prefetch and startup fetches matter.
type fakeDiff struct {
	fusefs.File
	name     string
	prefetch func(context.Context) error
	prove    func(context.Context, bool) error // nil: it is proven

	startup func(chunks []uint32) error
}

func (d *fakeDiff) ID() blockdev.Digest { return blockdev.Sum([]byte(d.name)) }
func (d *fakeDiff) MetaPath() string    { return "" }
func (d *fakeDiff) DataPath() string    { return "" }
func (d *fakeDiff) Complete() bool      { return false }
func (d *fakeDiff) Completed() bool     { return false }
func (d *fakeDiff) Stat() cache.Stat    { return cache.Stat{} }

func (d *fakeDiff) FullUse() (bytes, inodes int64, err error) { return 0, 0, nil }

func (d *fakeDiff) Proof() cache.ProofState {
	if d.prove == nil {
		return cache.Proven
	}
	return cache.Unproven
}

func (d *fakeDiff) Scrub(context.Context) error     { return nil }
func (d *fakeDiff) Scrubbed() time.Time             { return time.Time{} }
func (d *fakeDiff) Index() (*blockdev.Index, error) { return &blockdev.Index{}, nil }
func (d *fakeDiff) Verify(context.Context, bool) (*cache.Inspection, error) {
	return &cache.Inspection{}, nil
}

func (d *fakeDiff) Prove(ctx context.Context, hurry bool) error { return d.prove(ctx, hurry) }

func (d *fakeDiff) Hurry() func()                      { return func() {} }
func (d *fakeDiff) Distrust() error                    { return nil }
func (d *fakeDiff) Prefetch(ctx context.Context) error { return d.prefetch(ctx) }

// testQueues are queues without anything else of a Manager.
func testQueues(most int) (prefetches, proofs *queue) {
	cfg := Config{Log: slog.New(slog.DiscardHandler), PrefetchDiffs: most}
	q := newQueues(cfg, newMounter(cfg, ""))
	return q.prefetches, q.proofs
}

func (d *fakeDiff) FetchStartup(_ context.Context, chunks []uint32) error { return d.startup(chunks) }

// script notes which attempts began, and lets each take a second.
type script struct {
	mu    sync.Mutex
	began []string
	now   int
	most  int
	fail  map[string]int // how many attempts fail
}

func (s *script) volume(name string) *volume {
	d := &fakeDiff{name: name}
	d.prefetch = func(ctx context.Context) error {
		s.mu.Lock()
		s.began = append(s.began, name)
		s.now++
		s.most = max(s.most, s.now)
		fails := s.fail[name] > 0
		s.fail[name]--
		s.mu.Unlock()
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.now--
		}()
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if fails {
			return blockdev.ErrUnavailable
		}
		return nil
	}
	return &volume{id: d.ID(), diff: d, turn: make(chan struct{}, 1)}
}

func TestQueueOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{fail: map[string]int{}}
		q, _ := testQueues(2)
		vols := map[string]*volume{}
		var waits []*attempt
		add := func(name string, front bool) {
			if vols[name] == nil {
				vols[name] = s.volume(name)
			}
			a, err := q.add(vols[name], front)
			if err != nil {
				t.Fatal(err)
			}
			waits = append(waits, a)
		}
		for _, name := range []string{"a", "b", "c", "d", "e", "c", "a"} {
			add(name, false)
		}
		add("e", true)
		for _, a := range waits {
			<-a.done
			if a.err != nil {
				t.Error(a.err)
			}
		}
		slices.Sort(s.began[:2]) // two at a time begin in any order
		slices.Sort(s.began[2:4])
		if want := []string{"a", "b", "c", "e", "d"}; !slices.Equal(s.began, want) {
			t.Errorf("order is %v, want %v", s.began, want)
		}
		if s.most != 2 {
			t.Errorf("%d at a time", s.most)
		}
		q.close(nil)
		if _, err := q.add(vols["a"], false); !errors.Is(err, errClosed) {
			t.Errorf("add after close: %v", err)
		}
	})
}

func TestQueueRepeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{fail: map[string]int{"a": 3}}
		q, _ := testQueues(1)
		v := s.volume("a")
		begin := time.Now()
		first, err := q.add(v, false)
		if err != nil {
			t.Fatal(err)
		}
		<-first.done
		if !errors.Is(first.err, blockdev.ErrUnavailable) || q.state(v) != Waiting {
			t.Errorf("first attempt: %v, then %v", first.err, q.state(v))
		}
		// Attempts of 1 s each after pauses of 1, 2 and 4 s.
		time.Sleep(10*time.Second + time.Millisecond)
		synctest.Wait()
		if q.state(v) != Idle || len(s.began) != 4 {
			t.Errorf("%d attempts after %v, state %v", len(s.began), time.Since(begin), q.state(v))
		}
		q.close([]*volume{v})
	})
}

func TestQueueDrop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{fail: map[string]int{"waiting": 1}}
		q, _ := testQueues(1)
		waiting, running, queued := s.volume("waiting"), s.volume("running"), s.volume("queued")
		w, _ := q.add(waiting, false)
		<-w.done
		r, _ := q.add(running, false)
		l, _ := q.add(queued, false)
		synctest.Wait()
		for _, v := range []*volume{waiting, queued, running} {
			if err := q.drop(t.Context(), v); err != nil {
				t.Error(err)
			}
			if _, err := q.add(v, true); !errors.Is(err, errRemoved) {
				t.Errorf("add of a dropped volume: %v", err)
			}
			if q.state(v) != Idle {
				t.Errorf("dropped, but %v", q.state(v))
			}
		}
		<-r.done
		<-l.done
		if !errors.Is(r.err, errRemoved) || !errors.Is(l.err, errRemoved) {
			t.Errorf("%v, %v", r.err, l.err)
		}
		time.Sleep(time.Hour)
		if want := []string{"waiting", "running"}; !slices.Equal(s.began, want) {
			t.Errorf("began %v, want %v", s.began, want)
		}
		q.allow(running)
		a, err := q.add(running, false)
		if err != nil {
			t.Fatal(err)
		}
		<-a.done
		if a.err != nil {
			t.Error(a.err)
		}
		q.close(nil)
	})
}

func TestQueueClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{fail: map[string]int{"waiting": 1}}
		q, _ := testQueues(1)
		waiting, running, queued := s.volume("waiting"), s.volume("running"), s.volume("queued")
		w, _ := q.add(waiting, false)
		<-w.done
		r, _ := q.add(running, false)
		l, _ := q.add(queued, false)
		synctest.Wait()
		q.close([]*volume{waiting, running, queued})
		<-r.done
		<-l.done
		if !errors.Is(r.err, errClosed) || !errors.Is(l.err, errClosed) {
			t.Errorf("%v, %v", r.err, l.err)
		}
		time.Sleep(time.Hour)
		if len(s.began) != 2 {
			t.Errorf("began %v", s.began)
		}
	})
}

// TestPause: what nobody wants any more ends, wherever it is in the queue, and
// begins anew when it is wanted again; what somebody waits for goes on.
func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{fail: map[string]int{"failing": 1}}
		q, proofs := testQueues(1)
		vols := map[string]*volume{}
		add := func(name string) *attempt {
			if vols[name] == nil {
				vols[name] = s.volume(name)
			}
			a, err := q.add(vols[name], false)
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		running, queued := add("running"), add("queued")
		synctest.Wait()
		q.pause(vols["queued"])
		q.pause(vols["running"])
		again := add("running") // before the attempt has ended
		if again != running {
			t.Error("the attempt that ends was replaced")
		}
		waited := make(chan error, 1)
		go func() { waited <- q.await(t.Context(), vols["running"], func() {}) }()
		<-running.done
		if <-queued.done; !errors.Is(running.err, errPaused) || !errors.Is(queued.err, errPaused) {
			t.Errorf("paused attempts ended with %v and %v", running.err, queued.err)
		}
		synctest.Wait()
		q.pause(vols["running"]) // somebody waits for it
		if err := <-waited; err != nil {
			t.Errorf("who waits for a paused diff gets %v", err)
		}

		add("failing")
		time.Sleep(1500 * time.Millisecond)
		if st := q.state(vols["failing"]); st != Waiting {
			t.Fatalf("a failed prefetch is %v", st)
		}
		q.pause(vols["failing"])
		time.Sleep(time.Hour)
		want := []string{"running", "running", "failing"}
		if s.mu.Lock(); !slices.Equal(s.began, want) {
			t.Errorf("began %v, want %v", s.began, want)
		}
		s.mu.Unlock()
		for name, v := range vols {
			if st := q.state(v); st != Idle {
				t.Errorf("%s is %v", name, st)
			}
		}
		q.close(nil)
		proofs.close(nil)
	})
}
