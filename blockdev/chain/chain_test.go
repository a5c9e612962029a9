package chain

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// counted counts what a source is asked for.
type counted struct {
	blockdev.Source
	requests, chunks atomic.Int64
}

func (c *counted) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	c.requests.Add(1)
	c.chunks.Add(int64(len(req.Chunks)))
	return c.Source.Fetch(ctx, req, deliver)
}

func failing(err error) blockdevtest.SourceFunc {
	return func(context.Context, blockdev.Request, blockdev.Deliver) error { return err }
}

// silent delivers nothing and ends with its context.
func silent(ctx context.Context, _ blockdev.Request, _ blockdev.Deliver) error {
	<-ctx.Done()
	return ctx.Err()
}

func memory(data [][]byte) *blockdevtest.Memory {
	m := new(blockdevtest.Memory)
	for _, b := range data {
		m.Put(b)
	}
	return m
}

// TestSource: a chain is a Source, whichever of its sources has the chunks.
func TestSource(t *testing.T) {
	down := Step{Name: "empty", Source: new(blockdevtest.Memory)}
	for name, steps := range map[string]func([][]byte) []Step{
		"one":    func(d [][]byte) []Step { return []Step{{Name: "all", Source: memory(d)}} },
		"second": func(d [][]byte) []Step { return []Step{down, {Name: "all", Source: memory(d)}} },
		"halves": func(d [][]byte) []Step {
			n := len(d) / 2
			return []Step{{Name: "front", Source: memory(d[:n])}, down, {Name: "back", Source: memory(d[n:])}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			blockdevtest.TestSource(t, func(_ *testing.T, data [][]byte) blockdev.Source { return New(steps(data)...) })
		})
	}
}

// fetch asks for all of a diff and returns how many chunks came right.
func fetch(ctx context.Context, s blockdev.Source, prio blockdev.Priority, ix *blockdev.Index) (n int, err error) {
	err = s.Fetch(ctx, blockdev.Request{Diff: ix.DiffID, Priority: prio, Chunks: ix.Chunks}, func(i int, data []byte) error {
		if blockdev.Sum(data) != ix.Chunks[i].Digest {
			return fmt.Errorf("chunk %d: %w", i, blockdev.ErrCorrupt)
		}
		n++
		return nil
	})
	return n, err
}

func fixture() (*blockdev.Index, *blockdevtest.Memory) {
	ix, data := blockdevtest.Diff(1, 1<<20)
	m := new(blockdevtest.Memory)
	m.PutDiff(ix, data)
	return ix, m
}

// TestRest: the next source is asked for nothing that has come, and for all that
// has not, also for what came wrong.
func TestRest(t *testing.T) {
	ix, m := fixture()
	half := blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		req.Chunks = req.Chunks[:len(req.Chunks)/2]
		if err := m.Fetch(ctx, req, deliver); err != nil {
			return err
		}
		return deliver(len(req.Chunks), []byte("wrong"))
	})
	rest := &counted{Source: m}
	n, err := fetch(t.Context(), New(Step{Name: "half", Source: half}, Step{Name: "rest", Source: rest}), blockdev.Demand, ix)
	if err != nil || n != len(ix.Chunks) {
		t.Fatalf("%d of %d chunks, %v", n, len(ix.Chunks), err)
	}
	if want := len(ix.Chunks) - len(ix.Chunks)/2; int(rest.chunks.Load()) != want {
		t.Errorf("the second source was asked for %d chunks, want %d", rest.chunks.Load(), want)
	}
}

// TestRequest: the sources see the request that was made, but for what has come.
func TestRequest(t *testing.T) {
	ix, m := fixture()
	seen := 0
	source := blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		seen++
		if req.Diff != ix.DiffID || req.Priority != blockdev.Startup || req.Hops != 3 {
			t.Errorf("request is %v, priority %v, %d hops", req.Diff, req.Priority, req.Hops)
		}
		if seen == 1 {
			return blockdev.ErrUnavailable
		}
		return m.Fetch(ctx, req, deliver)
	})
	req := blockdev.Request{Diff: ix.DiffID, Priority: blockdev.Startup, Hops: 3, Chunks: ix.Chunks}
	if err := New(Step{Name: "a", Source: source}, Step{Name: "b", Source: source}).Fetch(t.Context(), req, func(int, []byte) error { return nil }); err != nil || seen != 2 {
		t.Errorf("%d sources asked, %v", seen, err)
	}
}

// TestError: the error names everybody who was asked, and gives hope if anybody
// does.
func TestError(t *testing.T) {
	ix, _ := fixture()
	c := New(Step{Name: "supernode", Source: failing(fmt.Errorf("supernode 12D3: gone: %w", blockdev.ErrNotFound))},
		Step{Name: "registry", Source: failing(fmt.Errorf("on fire: %w", blockdev.ErrUnavailable))})
	_, err := fetch(t.Context(), c, blockdev.Demand, ix)
	if err == nil || err.Error() != "supernode 12D3: gone: not found; registry: on fire: source unavailable" {
		t.Errorf("error is %v", err)
	}
	if errors.Is(err, blockdev.ErrNotFound) || !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("%v does not say that trying again may help", err)
	}
	c = New(Step{Name: "a", Source: failing(blockdev.ErrNotFound)}, Step{Name: "b", Source: failing(blockdev.ErrUnauthorized)})
	if _, err = fetch(t.Context(), c, blockdev.Demand, ix); !errors.Is(err, blockdev.ErrNotFound) || !errors.Is(err, blockdev.ErrUnauthorized) {
		t.Errorf("error is %v", err)
	}
	c = New(Step{Name: "liar", Source: failing(nil)})
	if _, err = fetch(t.Context(), c, blockdev.Demand, ix); !errors.Is(err, blockdev.ErrUnavailable) || !strings.Contains(err.Error(), "liar") {
		t.Errorf("error is %v", err)
	}
	if _, err = fetch(t.Context(), New(), blockdev.Demand, ix); !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("error of a chain of nobody is %v", err)
	}
}

// TestSilent: a source that never answers costs its patience once; for a while it
// is asked last, and when it is all there is, it has all the time.
func TestSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ix, m := fixture()
		mute := &counted{Source: blockdevtest.SourceFunc(silent)}
		c := New(Step{Name: "mute", Source: mute, Patience: 5 * time.Second}, Step{Name: "registry", Source: m})
		began := time.Now()
		for range 3 {
			if n, err := fetch(t.Context(), c, blockdev.Demand, ix); err != nil || n != len(ix.Chunks) {
				t.Fatal(n, err)
			}
		}
		if d := time.Since(began); d != 5*time.Second || mute.requests.Load() != 1 {
			t.Errorf("took %v and %d requests, want 5s and one", d, mute.requests.Load())
		}
		time.Sleep(silentFor)
		if _, err := fetch(t.Context(), c, blockdev.Demand, ix); err != nil || mute.requests.Load() != 2 {
			t.Errorf("not tried again: %v", err)
		}
		c = New(Step{Name: "mute", Source: mute, Patience: 5 * time.Second})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		began = time.Now()
		if _, err := fetch(ctx, c, blockdev.Demand, ix); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Minute {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

// of returns an index with the same chunks of another diff.
func of(ix *blockdev.Index, name string) *blockdev.Index {
	other := *ix
	other.DiffID = blockdev.Sum([]byte(name))
	return &other
}

// TestSilentAboutOne: a source that is silent about one diff is asked for others as
// before; one that is silent about all is not waited for by each of them.
func TestSilentAboutOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ix, all := fixture()
		hangs, other := of(ix, "hangs"), of(ix, "other")
		var down atomic.Bool
		first := &counted{Source: blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
			if req.Diff == hangs.DiffID || down.Load() {
				return silent(ctx, req, deliver)
			}
			return all.Fetch(ctx, req, deliver)
		})}
		last := &counted{Source: all}
		c := New(Step{Name: "first", Source: first, Patience: 2 * time.Second}, Step{Name: "last", Source: last})
		read := func(ix *blockdev.Index, wantFirst, wantLast int64) {
			t.Helper()
			first.requests.Store(0)
			last.requests.Store(0)
			if n, err := fetch(t.Context(), c, blockdev.Demand, ix); err != nil || n != len(ix.Chunks) {
				t.Fatal(n, err)
			}
			if f, l := first.requests.Load(), last.requests.Load(); f != wantFirst || l != wantLast {
				t.Errorf("%d and %d requests, want %d and %d", f, l, wantFirst, wantLast)
			}
		}
		read(hangs, 1, 1) // waits, and then the last one has it
		read(hangs, 0, 1) // is not waited for again
		read(other, 1, 0) // goes where it always went
		down.Store(true)
		read(other, 1, 1)           // the second silence; but the first was before the source was heard of
		read(of(ix, "third"), 1, 1) // another, and nothing in between
		read(of(ix, "fourth"), 0, 1)
		down.Store(false)
		time.Sleep(silentFor)
		read(other, 1, 0)
	})
}

// TestHealingHangs: a source that says at once that it has nothing is well, however long
// it takes to be healed.
func TestHealingHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ix, all := fixture()
		one, two := of(ix, "one"), of(ix, "two")
		first := &counted{Source: blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
			if req.Diff == one.DiffID || req.Diff == two.DiffID {
				return blockdev.ErrNotFound
			}
			return all.Fetch(ctx, req, deliver)
		})}
		heal := func(ctx context.Context, _ blockdev.Digest) error { <-ctx.Done(); return ctx.Err() }
		last := &counted{Source: all}
		c := New(Step{Name: "first", Source: first, Patience: 2 * time.Second, Heal: heal}, Step{Name: "last", Source: last})
		for _, ix := range []*blockdev.Index{one, two, of(ix, "well")} {
			last.requests.Store(0)
			if n, err := fetch(t.Context(), c, blockdev.Demand, ix); err != nil || n != len(ix.Chunks) {
				t.Fatal(n, err)
			}
		}
		if n := last.requests.Load(); n != 0 {
			t.Error("another diff is read from the last source")
		}
	})
}

// TestPrefetchAfter: prefetch leaves the registry alone for a while.
func TestPrefetchAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ix, m := fixture()
		var up atomic.Bool
		super := blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
			if up.Load() {
				return m.Fetch(ctx, req, deliver)
			}
			return blockdev.ErrUnavailable
		})
		registry := &counted{Source: m}
		c := New(Step{Name: "supernode", Source: super}, Step{Name: "registry", Source: registry, PrefetchAfter: 30 * time.Second})
		expect := func(ok bool, asked int64) {
			t.Helper()
			if _, err := fetch(t.Context(), c, blockdev.Prefetch, ix); (err == nil) != ok || registry.requests.Load() != asked {
				t.Errorf("%v, the registry has been asked %d times", err, registry.requests.Load())
			}
		}
		expect(false, 0)
		time.Sleep(31 * time.Second)
		expect(true, 1)
		up.Store(true)
		expect(true, 1)
		up.Store(false)
		expect(false, 1)
		if _, err := fetch(t.Context(), c, blockdev.Demand, ix); err != nil {
			t.Errorf("demand does not wait: %v", err)
		}
	})
}

// TestHeal: a source that has lost a diff and got it again is asked once more.
func TestHeal(t *testing.T) {
	ix, m := fixture()
	var there atomic.Bool
	lost := blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		if there.Load() {
			return m.Fetch(ctx, req, deliver)
		}
		return blockdev.ErrNotFound
	})
	heal := func(_ context.Context, diff blockdev.Digest) error {
		if diff != ix.DiffID {
			t.Errorf("heal of %v", diff)
		}
		there.Store(true)
		return nil
	}
	if n, err := fetch(t.Context(), New(Step{Name: "s", Source: lost, Heal: heal}), blockdev.Demand, ix); err != nil || n != len(ix.Chunks) {
		t.Fatal(n, err)
	}
	there.Store(false)
	cannot := func(context.Context, blockdev.Digest) error {
		return fmt.Errorf("registry down: %w", blockdev.ErrUnavailable)
	}
	_, err := fetch(t.Context(), New(Step{Name: "s", Source: lost, Heal: cannot}), blockdev.Demand, ix)
	if err == nil || !strings.Contains(err.Error(), "registry down") {
		t.Errorf("error is %v", err)
	}
}

// TestRestart: a source that refuses requests for a moment is asked again by all that
// somebody waits for, and the next source is not asked.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ix, m := fixture()
		var back time.Time
		super := blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
			if time.Now().Before(back) {
				return blockdev.ErrUnavailable
			}
			return m.Fetch(ctx, req, deliver)
		})
		registry := &counted{Source: m}
		c := New(Step{Name: "supernode", Source: super, Patience: 10 * time.Second, Away: func() bool { return false }},
			Step{Name: "registry", Source: registry})
		for _, prio := range []blockdev.Priority{blockdev.Demand, blockdev.Startup} {
			began := time.Now()
			back = began.Add(3 * time.Second)
			if n, err := fetch(t.Context(), c, prio, ix); err != nil || n != len(ix.Chunks) {
				t.Errorf("%v: %d of %d chunks, %v", prio, n, len(ix.Chunks), err)
			}
			if took := time.Since(began); took < 3*time.Second || took > 3*time.Second+maxPause {
				t.Errorf("%v: took %v", prio, took)
			}
		}
		if n := registry.requests.Load(); n != 0 {
			t.Errorf("the registry was asked %d times", n)
		}
		began := time.Now()
		back = began.Add(time.Second)
		if _, err := fetch(t.Context(), c, blockdev.Prefetch, ix); err != nil || time.Since(began) != 0 {
			t.Errorf("prefetch waits: %v, %v", time.Since(began), err)
		}
	})
}

// TestBreaksInTheMiddle: a source that goes away in the middle of an answer and comes back
// is asked for the rest.
func TestBreaksInTheMiddle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ix, m := fixture()
		times := 0
		super := &counted{Source: blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
			if times++; times == 1 {
				req.Chunks = req.Chunks[:len(req.Chunks)/2]
				return errors.Join(m.Fetch(ctx, req, deliver), fmt.Errorf("the stream broke: %w", blockdev.ErrUnavailable))
			}
			return m.Fetch(ctx, req, deliver)
		})}
		registry := &counted{Source: m}
		c := New(Step{Name: "supernode", Source: super, Patience: 10 * time.Second, Away: func() bool { return false }},
			Step{Name: "registry", Source: registry})
		if n, err := fetch(t.Context(), c, blockdev.Demand, ix); err != nil || n != len(ix.Chunks) || registry.requests.Load() != 0 {
			t.Errorf("%d of %d chunks, %v; the registry was asked %d times", n, len(ix.Chunks), err, registry.requests.Load())
		}
		if want := int64(len(ix.Chunks) + len(ix.Chunks) - len(ix.Chunks)/2); super.chunks.Load() != want {
			t.Errorf("asked for %d chunks in all, want %d", super.chunks.Load(), want)
		}
	})
}

// TestGoneForLong: what it costs to wait for a source that does not come back is paid
// once: by what was asked before it was known to be away.
func TestGoneForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ix, m := fixture()
		gone := time.Now()
		const patience = 10 * time.Second
		registry := &counted{Source: m}
		c := New(Step{Name: "supernode", Source: failing(blockdev.ErrUnavailable), Patience: patience,
			Away: func() bool { return time.Since(gone) > patience }}, Step{Name: "registry", Source: registry})
		time.Sleep(4 * time.Second)
		read := func(name string, least, most time.Duration) {
			t.Helper()
			began := time.Now()
			if n, err := fetch(t.Context(), c, blockdev.Demand, of(ix, name)); err != nil || n != len(ix.Chunks) {
				t.Fatal(n, err)
			}
			if took := time.Since(began); took < least || took > most {
				t.Errorf("read of %s took %v, want %v to %v", name, took, least, most)
			}
		}
		read("one", 6*time.Second, 6*time.Second+maxPause)
		read("one", 0, 0)
		read("two", 0, 0)
		time.Sleep(time.Hour)
		read("two", 0, 0)
		// It is not away for long, and refuses all the same: its patience, once for a while.
		gone = time.Now().Add(time.Hour)
		read("three", patience, patience)
		read("three", 0, 0)
		// Why a source is silent is in the error, if it says so.
		c = New(Step{Name: "supernode", Source: blockdevtest.SourceFunc(silent), Patience: patience, Status: func() error {
			return fmt.Errorf("cannot connect: %w", blockdev.ErrUnavailable)
		}}, Step{Name: "registry", Source: failing(blockdev.ErrUnavailable)})
		if _, err := fetch(t.Context(), c, blockdev.Demand, ix); err == nil || !strings.Contains(err.Error(), "cannot connect") {
			t.Errorf("%v does not say that there is no connection", err)
		}
	})
}

// TestFrom: a read is told which source its chunk has come from, and what a source says
// of itself stays.
func TestFrom(t *testing.T) {
	ix, m := fixture()
	front := blockdevtest.SourceFunc(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		for i, c := range req.Chunks[:2] {
			req.Comes(blockdev.FromPeer)
			err := m.Fetch(ctx, blockdev.Request{Diff: req.Diff, Chunks: []blockdev.Chunk{c}}, func(_ int, b []byte) error { return deliver(i, b) })
			if err != nil {
				return err
			}
		}
		return blockdev.ErrNotFound
	})
	var from blockdev.Origin
	got := map[blockdev.Origin]int{}
	c := New(Step{Name: "front", Source: front}, Step{Name: "registry", Source: m, From: blockdev.FromRegistry})
	err := c.Fetch(t.Context(), blockdev.Request{Diff: ix.DiffID, Chunks: ix.Chunks, From: &from}, func(int, []byte) error {
		got[from]++
		return nil
	})
	if err != nil || got[blockdev.FromPeer] != 2 || got[blockdev.FromRegistry] != len(ix.Chunks)-2 {
		t.Errorf("%d chunks come from %v, %v", len(ix.Chunks), got, err)
	}
}
