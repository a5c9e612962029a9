package layers

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
	"github.com/shoalfs/shoal/supernode/access"
	"github.com/shoalfs/shoal/supernode/store"
)

// listed is a request for a layer that an image of this registry lists.
func listed(f *registrytest.Fake, l registrytest.Layer, size int64) Request {
	return Request{
		Manifest: &registry.Manifest{Ref: f.Host + "/x:v1", Host: f.Host, Repository: "x", Digest: blockdev.Digest{1}},
		Layer:    registry.Layer{Digest: blockdev.Sum(l.Blob), Size: size, MediaType: l.MediaType, DiffID: l.DiffID},
		Verdict:  access.Verdict{Public: true},
	}
}

// sends is how a registry sends the blobs of layers: so many bytes at a time. next gives
// the bytes from an offset on, none at the end.
type sends struct {
	step  int
	every time.Duration
	next  func(r *http.Request, at int64, step int) []byte
	over  <-chan struct{} // the end of the test
	began func()
	from  []int64 // offsets that were asked for
	mu    sync.Mutex
}

func (s *sends) odd(w http.ResponseWriter, r *http.Request) bool {
	var at int64
	_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &at) // without a range it is 0
	s.mu.Lock()
	s.from = append(s.from, at)
	s.mu.Unlock()
	if at > 0 {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/*", at, 1<<40))
		w.WriteHeader(http.StatusPartialContent)
	}
	tick := time.NewTicker(s.every)
	defer tick.Stop()
	for {
		b := s.next(r, at, s.step)
		if len(b) == 0 {
			return true
		}
		if _, err := w.Write(b); err != nil || http.NewResponseController(w).Flush() != nil {
			return true
		}
		at += int64(len(b))
		s.began()
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return true
		case <-s.over:
			return true
		}
	}
}

// resumed says whether a blob was asked for from its middle on.
func (s *sends) resumed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, at := range s.from {
		if at > 0 {
			return true
		}
	}
	return false
}

// TestHeldVerifications: as many registries as there are places that list a stored layer with
// a size that it does not have, and never end with it, hold up no other registry's layer,
// although no request waits for them any more.
func TestHeldVerifications(t *testing.T) {
	for name, how := range map[string]struct {
		step  int
		every time.Duration
		least int64
	}{
		"a byte now and then": {1, 20 * time.Millisecond, 128 << 10},
		// Every byte would be fast enough, if it were the layer's.
		"more than the layer has": {16 << 10, 5 * time.Millisecond, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(c *Config) {
				c.Ingest.Parallel, c.Ingest.Turn, c.Ingest.LeastRate = 1, 200*time.Millisecond, how.least
			})
			first, l := registrytest.NewFake(t), registrytest.GzipLayer(t, "l", 1000, 1)
			first.Push(t, "x", "v1", l)
			if err := r.ensure(t, first.Host+"/x:v1"); err != nil {
				t.Fatal(err)
			}
			junk := make([]byte, how.step)
			ctx, cancel := context.WithCancel(t.Context())
			var began, left sync.WaitGroup
			for range hostsFactor {
				began.Add(1)
				s := &sends{step: how.step, every: how.every, over: t.Context().Done(), began: sync.OnceFunc(began.Done)}
				s.next = func(*http.Request, int64, int) []byte { return junk }
				f := registrytest.NewFake(t)
				f.Script(registrytest.On(http.MethodGet, "/blobs/", s.odd))
				left.Go(func() {
					if _, err := r.Ensure(ctx, listed(f, l, 1<<40)); !errors.Is(err, context.Canceled) {
						t.Errorf("a layer that never ends: %v", err)
					}
				})
			}
			began.Wait()
			cancel()
			left.Wait()
			honest := registrytest.NewFake(t)
			honest.Push(t, "x", "v1", l)
			if err := r.ensure(t, honest.Host+"/x:v1"); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestClaimedSize: what only a manifest says about a layer's size does not keep its
// verification going when no request waits for it.
func TestClaimedSize(t *testing.T) {
	const stored = 10 << 20
	for claimed, want := range map[int64]time.Duration{1 << 40: restoreTime + 10*time.Second, stored: restoreTime + 10*time.Second, 0: restoreTime} {
		if p := alone(store.LayerRecord{Size: stored}, Request{Layer: registry.Layer{Size: claimed}}); p.Least != want || p.Outlives || p.Grace != 0 {
			t.Errorf("said to have %d bytes: %+v", claimed, p)
		}
	}
}

// TestSlowVerifications: registries that are slow, while others wait, get there in turns,
// each of which goes on from where the last one was.
func TestSlowVerifications(t *testing.T) {
	for name, torn := range map[string]bool{"whole": false, "what comes from the middle on is something else": true} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(c *Config) { c.Ingest.Parallel, c.Ingest.Turn = 1, 20*time.Millisecond })
			first, slow := registrytest.NewFake(t), registrytest.NewFake(t)
			blobs := map[string][]byte{}
			var reqs [2]Request
			for i := range reqs {
				l := registrytest.GzipLayer(t, "l", 500, uint64(1+i))
				blobs["/v2/x/blobs/"+blockdev.Sum(l.Blob).String()] = l.Blob
				reqs[i] = listed(slow, l, int64(len(l.Blob)))
				first.Push(t, "x", fmt.Sprint("v", i), l)
				if err := r.ensure(t, fmt.Sprintf("%s/x:v%d", first.Host, i)); err != nil {
					t.Fatal(err)
				}
			}
			s := &sends{step: 4, every: time.Millisecond, over: t.Context().Done(), began: func() {}}
			s.next = func(r *http.Request, at int64, step int) []byte {
				b := blobs[r.URL.Path]
				b = b[min(at, int64(len(b))):]
				b = b[:min(step, len(b))]
				if torn && r.Header.Get("Range") != "" {
					return make([]byte, len(b))
				}
				return b
			}
			slow.Script(registrytest.On(http.MethodGet, "/blobs/", s.odd))
			var errs [2]error
			var wg sync.WaitGroup
			for i := range reqs {
				wg.Go(func() { _, errs[i] = r.Ensure(t.Context(), reqs[i]) })
			}
			wg.Wait()
			if !s.resumed() {
				t.Error("the second has waited for all of the first")
			}
			err := errors.Join(errs[:]...)
			if torn != (err != nil) || torn && (!errors.Is(err, blockdev.ErrUnavailable) || errors.Is(err, blockdev.ErrCorrupt)) {
				t.Errorf("%v", err)
			}
			for _, req := range reqs { // nothing wrong is remembered
				if _, err := r.Ensure(t.Context(), req); err != nil {
					t.Errorf("alone: %v", err)
				}
			}
		})
	}
}
