package supernode

import (
	"context"
	"reflect"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/blockdev/layer"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
	"github.com/shoalfs/shoal/supernode/layers"
)

// aHolder is a node that has what a supernode has, and may lie.
type aHolder struct {
	t      *testing.T
	has    *Supernode
	image  string // that it is in the group of
	lie    func(*image.Image)
	spoil  func(data []byte) []byte
	asked  atomic.Int32
	closed atomic.Int32
}

func (h *aHolder) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	h.asked.Add(1)
	if req.Credential != nobody {
		h.t.Error("a node is given a credential")
	}
	all, err := h.has.FetchIndexes(ctx, image.Request{Ref: h.image, Platform: amd64})
	if err != nil {
		return nil, err
	}
	img := &image.Image{Manifest: req.Manifest}
	for _, l := range all.Layers {
		if slices.Contains(req.Only, l.DiffID) {
			img.Layers = append(img.Layers, image.Layer{DiffID: l.DiffID, Index: l.Index})
		}
	}
	if h.lie != nil {
		h.lie(img)
	}
	return img, nil
}

func (h *aHolder) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	return h.has.Fetch(ctx, req, func(i int, data []byte) error {
		if h.spoil != nil {
			data = h.spoil(slices.Clone(data))
		}
		return deliver(i, data)
	})
}

func (h *aHolder) Close() error { h.closed.Add(1); return nil }

// What a supernode has lost it gets back from nodes, and from the registry only if
// they lie or have nothing.
func TestHolders(t *testing.T) {
	reg := registrytest.NewFake(t)
	ref := []registrytest.Layer{
		registrytest.GzipLayer(t, "large", 6<<20, 1), // several requests
		registrytest.GzipLayer(t, "small", 10, 2),
	}
	other := registrytest.GzipLayer(t, "other", 100_000, 3)
	reg.Push(t, "team/app", "v1", ref...)
	reg.Push(t, "team/other", "v1", other)
	had := start(t)
	for _, ref := range []string{"team/app:v1", "team/other:v1"} {
		if err := warm(t, had, request(reg.Target, ref, nobody), nil); err != nil {
			t.Fatal(err)
		}
	}
	foreign, err := had.FetchIndexes(t.Context(), request(reg.Target, "team/other:v1", nobody))
	if err != nil {
		t.Fatal(err)
	}
	right, err := had.FetchIndexes(t.Context(), request(reg.Target, "team/app:v1", nobody))
	if err != nil {
		t.Fatal(err)
	}
	forge := func(change func(*blockdev.Index)) func(*image.Image) {
		return func(img *image.Image) {
			ix, err := index.Decode(img.Layers[0].Index)
			if err != nil {
				t.Fatal(err)
			}
			change(ix)
			if img.Layers[0].Index, err = index.Encode(ix); err != nil {
				t.Fatal(err)
			}
		}
	}
	app := request(reg.Target, "team/app:v1", nobody).Ref
	for name, c := range map[string]struct {
		holder       *aHolder // nil: no node has it
		fromRegistry bool
	}{
		"has it":      {holder: &aHolder{}},
		"nobody":      {fromRegistry: true},
		"wrong bytes": {holder: &aHolder{spoil: func(b []byte) []byte { b[len(b)/2] ^= 1; return b }}, fromRegistry: true},
		"short":       {holder: &aHolder{spoil: func(b []byte) []byte { return b[:len(b)-1] }}, fromRegistry: true},
		"nothing":     {holder: &aHolder{lie: func(img *image.Image) { img.Layers = nil }}, fromRegistry: true},
		"another layer": {holder: &aHolder{lie: func(img *image.Image) {
			img.Layers[0].Index = foreign.Layers[0].Index
		}}, fromRegistry: true},
		"another layer's content": {holder: &aHolder{lie: forge(func(ix *blockdev.Index) {
			id := ix.DiffID
			got, err := index.Decode(foreign.Layers[0].Index)
			if err != nil {
				t.Fatal(err)
			}
			*ix = *got
			ix.DiffID = id
		})}, fromRegistry: true},
		"forged metadata": {holder: &aHolder{lie: forge(func(ix *blockdev.Index) { ix.Meta[len(ix.Meta)-1] ^= 1 })}, fromRegistry: true},
		"another builder's metadata": {holder: &aHolder{lie: forge(func(ix *blockdev.Index) {
			ix.Builder = layer.BuilderVersion + 1
			ix.Meta[len(ix.Meta)-1] ^= 1
		})}},
	} {
		t.Run(name, func(t *testing.T) {
			reg.Forget()
			if c.holder != nil {
				c.holder.t, c.holder.has, c.holder.image = t, had, app
			}
			s := start(t, func(cfg *Config) {
				cfg.Holders = func(manifest blockdev.Digest, origin string, n int) []layers.Holder {
					if c.holder == nil {
						return nil
					}
					if origin != reg.Host+"/team/app" || manifest == (blockdev.Digest{}) || n < 1 {
						t.Errorf("asked for %d holders of %s on the word of %s", n, manifest, origin)
					}
					return []layers.Holder{c.holder}
				}
			})
			img, err := s.FetchIndexesFor(t.Context(), "node", request(reg.Target, "team/app:v1", nobody))
			if err != nil {
				t.Fatal(err)
			}
			wantImage(t, s, img, ref...)
			for i, l := range img.Layers { // whoever has made it before
				got, err := index.Decode(l.Index)
				if err != nil {
					t.Fatal(err)
				}
				want, err := index.Decode(right.Layers[i].Index)
				if err != nil {
					t.Fatal(err)
				}
				if !reflect.DeepEqual(got, want) {
					t.Errorf("layer %d has another index than that of this version's builder", i)
				}
			}
			if n := blobs(reg, ref); (n > 0) != c.fromRegistry {
				t.Errorf("a layer was fetched %d times from the registry", n)
			}
			if h := c.holder; h != nil && (h.asked.Load() == 0 || h.closed.Load() == 0) {
				t.Errorf("asked %d times, closed %d times", h.asked.Load(), h.closed.Load())
			}
		})
	}
	// One that fails is followed by the next.
	bad := &aHolder{t: t, has: had, image: app, spoil: func(b []byte) []byte { b[0]++; return b }}
	good := &aHolder{t: t, has: had, image: app}
	reg.Forget()
	s := start(t, func(cfg *Config) {
		cfg.Holders = func(blockdev.Digest, string, int) []layers.Holder { return []layers.Holder{bad, good} }
	})
	if err := warm(t, s, request(reg.Target, "team/app:v1", nobody), nil); err != nil {
		t.Fatal(err)
	}
	if n := blobs(reg, ref); n != 0 {
		t.Errorf("a layer was fetched %d times from the registry although a node had it", n)
	}
}
