package ingest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/internal/image"
)

// drip sends a byte now and then, until the context ends.
type drip struct {
	ctx   context.Context
	every time.Duration
	r     io.Reader
}

func (d *drip) Read(p []byte) (int, error) {
	select {
	case <-time.After(d.every):
		return d.r.Read(p[:1])
	case <-d.ctx.Done():
		return 0, context.Cause(d.ctx)
	}
}

func (d *drip) Close() error { return nil }

// trickling makes a layer's registry one that sends so slowly.
func trickling(l Layer, host string, blob []byte, every time.Duration) Layer {
	l.Host, l.Origin = host, host+"/x"
	l.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) {
		return &drip{ctx, every, bytes.NewReader(blob[off:])}, nil
	}
	return l
}

// TestTricklingHosts: as many registries that send next to nothing as there are
// places, and more, hold nobody up: they wait behind whoever has had no place yet.
func TestTricklingHosts(t *testing.T) {
	f := newFixture(t, Config{Parallel: 1, Turn: 50 * time.Millisecond})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for i := range 2 * hostsFactor {
		diff := makeTar(t, uint64(100+i), 100<<10)
		blob := gzipped(t, diff)
		l := trickling(f.reg.add(blob, diff, gzipType), fmt.Sprint("slow", i), blob, 5*time.Millisecond)
		wg.Go(func() {
			if _, err := f.in.Layer(ctx, l, nil); err == nil {
				t.Error("a layer that trickles has come")
			}
		})
	}
	for f.in.small.Waiting() == 0 {
		time.Sleep(time.Millisecond)
	}
	diff := makeTar(t, 1, 100<<10)
	l := f.reg.add(gzipped(t, diff), diff, gzipType)
	if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
		t.Fatal(err)
	}
	checkStored(t, f.st, l, diff)
	if n := f.in.Stats().Yields; n == 0 {
		t.Error("nobody gave a place back")
	}
}

// TestSlowAlone: a registry that is slow while nobody waits goes on, and its layer
// comes; one that gave its place back goes on from where it was.
func TestSlowAlone(t *testing.T) {
	diff := makeTar(t, 1, 1000)
	blob := gzipped(t, diff)
	f := newFixture(t, Config{Parallel: 1, Turn: 20 * time.Millisecond})
	slow := trickling(f.reg.add(blob, diff, gzipType), "slow", blob, time.Millisecond/2)
	if _, err := f.in.Layer(t.Context(), slow, nil); err != nil {
		t.Fatal(err)
	}
	checkStored(t, f.st, slow, diff)
	if s := f.in.Stats(); s.Yields != 0 || s.Retries != 0 || s.Fetched != slow.Size {
		t.Errorf("nobody waited, and it was held up: %+v", s)
	}
	// Two of one registry, for one place.
	before := f.in.Stats()
	var wg sync.WaitGroup
	for i := range 2 {
		diff := makeTar(t, uint64(10+i), 1000)
		blob := gzipped(t, diff)
		l := trickling(f.reg.add(blob, diff, gzipType), "slow", blob, time.Millisecond/2)
		wg.Go(func() {
			if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
				t.Error(err)
				return
			}
			checkStored(t, f.st, l, diff)
		})
	}
	wg.Wait()
	s := f.in.Stats()
	if s.Yields == before.Yields {
		t.Error("the second waited for all of the first")
	}
	if s.Ingested != 3 {
		t.Errorf("%+v", s)
	}
}

// TestRoomAndPlace: who waits for room in the spool has no place meanwhile.
func TestRoomAndPlace(t *testing.T) {
	diff := makeTar(t, 1, 1<<20)
	blob := gzipped(t, diff)
	f := newFixture(t, Config{Parallel: 1, SpoolQuota: int64(len(blob)) + 100<<10})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	hold := func(l Layer) {
		wg.Go(func() {
			if _, err := f.in.Layer(ctx, l, nil); err == nil {
				t.Error("a layer that trickles has come")
			}
		})
	}
	hold(trickling(f.reg.add(blob, diff, gzipType), "a", blob, time.Hour))
	for f.in.spool.isFree() {
		time.Sleep(time.Millisecond)
	}
	other := makeTar(t, 2, 1<<20)
	b := f.reg.add(gzipped(t, other), other, gzipType)
	b.Host = "b"
	hold(b)
	for f.in.spool.waiting.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	// Of the registry whose layer waits for room, and has room itself.
	small := makeTar(t, 3, 50<<10)
	l := f.reg.add(gzipped(t, small), small, gzipType)
	l.Host = "b"
	if _, err := f.in.Layer(t.Context(), l, nil); err != nil {
		t.Fatal(err)
	}
	checkStored(t, f.st, l, small)
}

func (s *spool) isFree() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open) == 0
}

// TestNews: watchers hear how far a layer is without asking, at first, whenever it has
// come some way, and at last, and each a bounded number of times.
func TestNews(t *testing.T) {
	diff := makeTar(t, 1, 4<<20)
	f := newFixture(t, Config{})
	l := f.reg.add(gzipped(t, diff), diff, gzipType)
	var all []Progress
	if _, err := f.in.Layer(t.Context(), l, func(p Progress) { all = append(all, p) }); err != nil {
		t.Fatal(err)
	}
	first, last := all[0], all[len(all)-1]
	// The layer is on its way already when the first is told.
	if first.Stage != image.StageWaiting && first.Stage != image.StageFetching || last.Stage != image.StageStored || last.Fetched != l.Size || last.Layer != l.Digest {
		t.Errorf("%+v ... %+v", first, last)
	}
	if n := len(all); n < 5 || n > 2*newsParts+10 {
		t.Errorf("told %d times", n)
	}
}
