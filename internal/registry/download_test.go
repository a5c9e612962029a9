package registry_test

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	rt "github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestDownloadIsShared: registries share the download limit in turns, so that one with
// many layers does not hold up another one's; and manifests do not wait for it.
func TestDownloadIsShared(t *testing.T) {
	const rate = 2 << 20
	c := newClient(t, func(cfg *registry.Config) { cfg.Download = pace.New(rate) })
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	open := func() *registry.Manifest {
		f := rt.NewFake(t)
		f.Push(t, "app", "v1", rt.GzipLayer(t, "file", 1<<20, 9))
		m, err := c.Resolve(t.Context(), image.Request{Ref: f.Host + "/app:v1", Platform: amd64})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	read := func(m *registry.Manifest, layers int) *atomic.Int64 {
		got := new(atomic.Int64)
		for range layers {
			wg.Go(func() {
				for ctx.Err() == nil {
					rc, err := c.Fetch(ctx, m, m.Layers[0], nobody, 0)
					if err != nil {
						if ctx.Err() == nil {
							t.Error(err)
						}
						return
					}
					_, err = io.Copy(count{got}, rc)
					rc.Close()
					if err != nil && ctx.Err() == nil {
						t.Error(err)
					}
				}
			})
		}
		return got
	}
	busy, other := open(), open()
	begin := time.Now()
	many := read(busy, 12)
	for many.Load() < 512<<10 && t.Context().Err() == nil {
		time.Sleep(time.Millisecond)
	}
	open() // with its manifest and config, while there is a line for layers
	before, one := many.Load(), read(other, 1)
	for one.Load() < 512<<10 && t.Context().Err() == nil {
		time.Sleep(time.Millisecond)
	}
	b, o := many.Load()-before, one.Load()
	most := rate*time.Since(begin).Seconds() + 2*blockdev.MaxChunk + 13*64<<10 // a read each is here before it waits
	if b > 2*o {
		t.Errorf("a registry with 12 layers sent %d bytes while one with 1 sent %d", b, o)
	}
	if all := before + b + o; float64(all) > most {
		t.Errorf("%d bytes came, where the limit allows %.0f", all, most)
	}
}

type count struct{ n *atomic.Int64 }

func (c count) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}
