package cache

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/cache/internal/presence"
)

// TestRecording: reads are noted in their order, whether by Local or ReadAt,
// fetched or there already, each chunk once, ranked over all diffs.
func TestRecording(t *testing.T) {
	r := newRig(t, 2<<20, func(c *Config) { c.ReadAhead = -1 })
	ix, data := blockdevtest.Diff(77, 1<<20)
	r.mem.PutDiff(ix, data)
	other := r.add(ix)
	last := r.d.tab.Len() - 1
	r.checkRead(r.d.tab.Start(3), 1) // before the recording: there already
	if err := r.d.sync(t.Context()); err != nil {
		t.Fatal(err)
	}

	rec := Record(r.d, other)
	if !rec.Last().IsZero() {
		t.Error("something was touched before anything was read")
	}
	r.checkRead(r.d.tab.Start(last), 1)
	if _, ok := r.d.Local(r.d.tab.Start(3), 1); !ok {
		t.Fatal("chunk 3 is not there")
	}
	r.check(other, padded(data), 0, 1)
	r.checkRead(r.d.tab.Start(last), 1)
	r.checkRead(r.d.tab.Start(1), r.d.tab.Length(1)+1)
	if d := time.Since(rec.Last()); d < 0 || d > time.Minute {
		t.Errorf("touched %v ago", d)
	}
	if again := Record(r.d, other); len(again.tracks) != 0 {
		t.Error("two recordings of one diff")
	}
	want := []blockdev.DiffProfile{
		{Diff: r.d.id, Profile: blockdev.Profile{{Chunk: uint32(last), Rank: 0}, {Chunk: 3, Rank: 1}, {Chunk: 1, Rank: 3}, {Chunk: 2, Rank: 4}}},
		{Diff: other.id, Profile: blockdev.Profile{{Chunk: 0, Rank: 2}}},
	}
	if got := rec.Stop(); !reflect.DeepEqual(got, want) {
		t.Errorf("recorded %v, want %v", got, want)
	}
	r.checkRead(r.d.tab.Start(5), 1)
	if got := rec.Stop(); len(got) != 0 {
		t.Errorf("recorded after Stop: %v", got)
	}
	r.quiet()

	// A complete diff that FUSE still serves is recorded, too.
	r.prefetch()
	rec = Record(r.d)
	r.checkRead(r.d.tab.Start(4), 1)
	if got := rec.Stop(); len(got) != 1 || got[0].Profile[0].Chunk != 4 {
		t.Errorf("of a complete diff: %v", got)
	}
}

func TestRecordingIsBounded(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	tr := &track{r: &Recording{}, d: r.d, seen: presence.NewBitset(4 * blockdev.MaxProfile)}
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for i := range 4 * blockdev.MaxProfile {
				tr.touch(i, i+1)
			}
		})
	}
	readers.Wait()
	if n := len(tr.touches); n != blockdev.MaxProfile {
		t.Errorf("%d chunks", n)
	}
	for i, touch := range tr.touches {
		if int(touch.Rank) != i {
			t.Fatalf("row %d: %v", i, touch)
		}
	}
}

// TestFetchStartup: one request of its own priority, in the order asked for,
// without what is there, what is in flight, and what the diff does not have.
func TestFetchStartup(t *testing.T) {
	r := newRig(t, 2<<20, func(c *Config) { c.ReadAhead = -1 })
	r.checkRead(r.d.tab.Start(2), 1)
	r.quiet()
	var asked []blockdev.Request
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		req.Chunks = slices.Clone(req.Chunks)
		asked = append(asked, req)
		return r.mem.Fetch(ctx, req, deliver)
	})
	n := uint32(r.d.tab.Len())
	if err := r.d.FetchStartup(t.Context(), []uint32{7, 2, 5, n, 1<<32 - 1, 7}); err != nil {
		t.Fatal(err)
	}
	if len(asked) != 1 || asked[0].Priority != blockdev.Startup || len(asked[0].Chunks) != 2 ||
		asked[0].Chunks[0] != r.d.tab.Chunk(7) || asked[0].Chunks[1] != r.d.tab.Chunk(5) {
		t.Errorf("asked for %+v", asked)
	}
	if r.present() != 3 || r.Stats().StartupBytes != int64(r.d.tab.Length(7)+r.d.tab.Length(5)) {
		t.Errorf("%d chunks are there, %+v", r.present(), r.Stats())
	}
	if err := r.d.FetchStartup(t.Context(), []uint32{7, 5}); err != nil || len(asked) != 1 {
		t.Errorf("what is there already: %v, %d requests", err, len(asked))
	}

	down := errors.New("down")
	r.source(func(context.Context, blockdev.Request, blockdev.Deliver) error { return down })
	if err := r.d.FetchStartup(t.Context(), []uint32{9}); !errors.Is(err, down) {
		t.Errorf("the source's error: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.d.FetchStartup(ctx, []uint32{9}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := r.Remove(t.Context(), r.d.id); err != nil {
		t.Fatal(err)
	}
	if err := r.d.FetchStartup(t.Context(), []uint32{9}); !errors.Is(err, ErrRemoved) {
		t.Errorf("removed: %v", err)
	}
}

// TestStartupIsOvertaken: a demand read asks for other chunks at once, and takes
// over those of a startup request that does not bring them; prefetch waits.
func TestStartupIsOvertaken(t *testing.T) {
	r := newRig(t, 2<<20, func(c *Config) {
		c.ReadAhead, c.Promote = -1, time.Millisecond
		c.Quiet, c.GiveWay = time.Nanosecond, time.Hour
	})
	asked := make(chan struct{})
	r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
		switch req.Priority {
		case blockdev.Startup:
			close(asked)
			<-ctx.Done()
			return ctx.Err()
		case blockdev.Prefetch:
			t.Error("prefetch does not wait")
		}
		return r.mem.Fetch(ctx, req, deliver)
	})
	done := make(chan error)
	go func() { done <- r.d.FetchStartup(t.Context(), []uint32{4, 5, 6}) }()
	<-asked
	ctx, cancel := context.WithCancel(t.Context())
	fetched := make(chan error)
	go func() { fetched <- r.d.Prefetch(ctx) }()
	r.checkRead(0, 1)
	select {
	case err := <-done:
		t.Fatalf("ended by a read of another chunk: %v", err)
	default:
	}
	cancel()
	if err := <-fetched; !errors.Is(err, context.Canceled) {
		t.Errorf("prefetch: %v", err)
	}
	r.checkRead(r.d.tab.Start(5), 1)
	if err := <-done; err != nil {
		t.Errorf("taken over: %v", err)
	}
	r.quiet()
	if n := r.present(); n != 2 {
		t.Errorf("%d chunks are there: what nobody waits for is left out", n)
	}
}

// TestStartupIsAwaited: while startup chunks keep coming, a demand read waits for
// its own to come with them, and does not ask for it a second time.
func TestStartupIsAwaited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const promote = 50 * time.Millisecond
		r := newRig(t, 4<<20, func(c *Config) { c.ReadAhead, c.Promote = -1, promote })
		line := make([]uint32, 8)
		for i := range line {
			line[i] = uint32(i)
		}
		r.source(func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
			if req.Priority != blockdev.Startup {
				t.Errorf("asked again: %+v", req)
			}
			return r.mem.Fetch(ctx, req, func(i int, data []byte) error {
				time.Sleep(promote * 9 / 10)
				return deliver(i, data)
			})
		})
		done := make(chan error)
		go func() { done <- r.d.FetchStartup(t.Context(), line) }()
		synctest.Wait()
		r.checkRead(r.d.tab.Start(7), 1)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestStartupPagesStay: what a container is about to read is not dropped from the
// page cache by a sync.
func TestStartupPagesStay(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	onDisk(t, r.cfg.Root)
	if err := r.d.FetchStartup(t.Context(), []uint32{0, 1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	if err := r.d.sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := cachedBytes(t, r.d.data); n == 0 {
		t.Error("all pages are gone")
	}
	// Later, the next sync drops all that is left.
	r.d.keep.Store(1)
	r.checkRead(r.d.tab.Start(6), 1)
	r.quiet()
	if err := r.d.sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := cachedBytes(t, r.d.data); n > 64<<10 {
		t.Errorf("%d bytes stay in the page cache", n)
	}
}
