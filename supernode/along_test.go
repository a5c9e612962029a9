package supernode

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
	"github.com/shoalfs/shoal/supernode/layers"
)

// Nothing that is slow takes others along: no registry, no image, no node.

// trickle never ends with a blob: a byte comes now and then.
func trickle(t *testing.T, began chan<- struct{}, size int, blobs map[string]bool) registrytest.Odd {
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	return registrytest.On(http.MethodGet, "/blobs/", func(w http.ResponseWriter, r *http.Request) bool {
		if !blobs[r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]] {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(size))
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for first := true; ; first = false {
			if _, err := w.Write([]byte{0x1f}); err != nil {
				return true
			}
			if err := http.NewResponseController(w).Flush(); err != nil {
				return true
			}
			if first {
				select {
				case began <- struct{}{}:
				default: // enough have
				}
			}
			select {
			case <-done:
				return true
			case <-r.Context().Done():
				return true
			case <-tick.C:
			}
		}
	})
}

func TestSlowRegistryTakesNobodyAlong(t *testing.T) {
	const places = 2
	for _, kind := range []string{"small layers", "large layers", "layers that are verified"} {
		t.Run(kind, func(t *testing.T) {
			slow, good := registrytest.NewFake(t), registrytest.NewFake(t)
			s := start(t, func(c *Config) { c.Ingests = places })
			size := 1 << 20
			if kind == "large layers" {
				size = 9 << 20
			}
			var wg sync.WaitGroup
			began := make(chan struct{}, places)
			blobs := map[string]bool{}
			for i := range places + 2 { // some wait
				l := registrytest.GzipLayer(t, "l", 1000, uint64(20+i))
				config := registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, l)
				declared := size
				if kind == "layers that are verified" {
					declared = len(l.Blob)
					good.Push(t, fmt.Sprint("copy", i), "v1", l)
					if err := warm(t, s, request(good.Target, fmt.Sprintf("copy%d:v1", i), nobody), nil); err != nil {
						t.Fatal(err)
					}
				}
				slow.PushBlob(t, "x", config)
				m, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": registrytest.TypeManifest,
					"layers": []registrytest.Descriptor{{MediaType: l.MediaType, Digest: blockdev.Sum(l.Blob), Size: declared}},
					"config": registrytest.Descriptor{MediaType: registrytest.TypeConfig, Digest: blockdev.Sum(config), Size: len(config)}})
				if err != nil {
					t.Fatal(err)
				}
				slow.PushManifest(t, "x", fmt.Sprint("v", i), registrytest.TypeManifest, m)
				blobs[blockdev.Sum(l.Blob).String()] = true
			}
			slow.Script(trickle(t, began, size, blobs))
			ctx, cancel := context.WithCancel(t.Context())
			defer wg.Wait()
			defer cancel()
			for i := range places + 2 {
				wg.Go(func() {
					if _, err := s.FetchIndexesFor(ctx, "mallory", request(slow.Target, fmt.Sprintf("x:v%d", i), nobody)); err == nil {
						t.Error("a layer that never ends has come")
					}
				})
			}
			for range places {
				<-began
			}
			l := registrytest.GzipLayer(t, "g", size, 99)
			third := registrytest.NewFake(t)
			third.Push(t, "good", "v1", l)
			if kind == "layers that are verified" {
				good.Push(t, "good", "v1", l)
				if err := warm(t, s, request(good.Target, "good:v1", nobody), nil); err != nil {
					t.Fatal(err)
				}
			}
			img, err := s.FetchIndexesFor(t.Context(), "honest", request(third.Target, "good:v1", nobody))
			if err != nil {
				t.Fatal(err)
			}
			wantImage(t, s, img, l)
		})
	}
}

// stuckHolder does not answer.
type stuckHolder struct{ asked func() }

func (h stuckHolder) FetchIndexes(ctx context.Context, _ image.Request) (*image.Image, error) {
	h.asked()
	<-ctx.Done()
	return nil, ctx.Err()
}

func (stuckHolder) Fetch(ctx context.Context, _ blockdev.Request, _ blockdev.Deliver) error {
	<-ctx.Done()
	return ctx.Err()
}

func (stuckHolder) Close() error { return nil }

// restores is how many layers come from nodes at a time.
const restores = 2

// TestSlowHolders: a layer that no node has does not wait for those that nodes give
// back slowly.
func TestSlowHolders(t *testing.T) {
	f := registrytest.NewFake(t)
	lost := map[blockdev.Digest]bool{}
	for i := range restores {
		lost[f.Push(t, fmt.Sprint("lost", i), "v1", registrytest.GzipLayer(t, "a", 1000, uint64(1+i)))] = true
	}
	l := registrytest.GzipLayer(t, "c", 1000, 30)
	f.Push(t, "new", "v1", l)
	var asked, wg sync.WaitGroup
	asked.Add(restores)
	s := start(t, func(c *Config) {
		c.Holders = func(m blockdev.Digest, _ string, _ int) []layers.Holder {
			if lost[m] {
				return []layers.Holder{stuckHolder{asked.Done}}
			}
			return nil
		}
	})
	if n := s.layers.Places()["restoring"]().Capacity; n != restores {
		t.Fatalf("%d places for layers that come from nodes: others are to wait in this test", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer wg.Wait()
	defer cancel()
	for i := range restores {
		wg.Go(func() {
			if _, err := s.FetchIndexesFor(ctx, "n", request(f.Target, fmt.Sprintf("lost%d:v1", i), nobody)); !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
		})
	}
	asked.Wait()
	img, err := s.FetchIndexesFor(t.Context(), "m", request(f.Target, "new:v1", nobody))
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, s, img, l)
}
