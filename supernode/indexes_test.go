package supernode

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// An index is read once for all who ask at the same time, kept while it is stored and
// there is room, and not kept if it cannot be read.
func TestIndexes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reads atomic.Int64
		var fail, gone atomic.Bool
		release := make(chan struct{})
		x := newIndexes(func(ctx context.Context, diff blockdev.Digest) ([]byte, error) {
			reads.Add(1)
			select {
			case <-release:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			if fail.Load() {
				return nil, blockdev.ErrCorrupt
			}
			return make([]byte, 10+int(diff[0])), nil
		}, func(blockdev.Digest) bool { return !gone.Load() })
		defer func() { _ = x.close() }()
		x.limit = 25

		// The first one leaves; the others are not to pay for that.
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := x.get(ctx, blockdev.Digest{1}); !errors.Is(err, context.Canceled) {
				t.Errorf("who left: %v", err)
			}
		})
		synctest.Wait()
		for range 8 {
			all.Go(func() {
				e, err := x.get(t.Context(), blockdev.Digest{1})
				if err != nil || len(e.data) != 11 || e.sum != blockdev.Sum(e.data) {
					t.Errorf("%+v, %v", e, err)
				}
			})
		}
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(release)
		all.Wait()
		if n := reads.Load(); n != 1 {
			t.Errorf("read %d times, not once", n)
		}
		want := func(what string, diff byte, more int64) {
			t.Helper()
			before := reads.Load()
			if _, err := x.get(t.Context(), blockdev.Digest{diff}); err != nil && !fail.Load() {
				t.Errorf("%s: %v", what, err)
			}
			if n := reads.Load() - before; n != more {
				t.Errorf("%s: read %d times, not %d", what, n, more)
			}
		}
		want("kept", 1, 0)
		want("one more than there is room for", 5, 1)
		want("the newest", 5, 0)
		want("what made room", 1, 1)
		want("more than all the room", 100, 1)
		want("was not kept", 100, 1)
		if x.bytes < 0 || x.bytes > x.limit {
			t.Errorf("%d bytes are kept", x.bytes)
		}
		fail.Store(true)
		want("cannot be read", 7, 1)
		want("cannot be read again", 7, 1)
		fail.Store(false)
		want("can be read", 7, 1)
		gone.Store(true)
		before := reads.Load()
		if _, err := x.get(t.Context(), blockdev.Digest{7}); err != nil || reads.Load() != before+1 {
			t.Errorf("evicted from the store: %v, read %d times", err, reads.Load()-before)
		}
	})
}

// Indexes that are worth it are left out of an answer if nodes have them, and all is
// said that it takes to know them again.
func TestRelayed(t *testing.T) {
	relays := []image.Relay{{Key: [32]byte{1}}}
	s := start(t, func(c *Config) {
		c.Relays = func(_ context.Context, peer string, manifest blockdev.Digest) []image.Relay {
			if peer != "p" || manifest != (blockdev.Digest{9}) {
				t.Errorf("asked for relays for %q and image %s", peer, manifest)
			}
			return relays
		}
	})
	newImage := func(sizes ...int) *image.Image {
		img := &image.Image{Manifest: blockdev.Digest{9}}
		for i, n := range sizes {
			l := image.Layer{DiffID: blockdev.Digest{byte(i)}}
			if n > 0 {
				l.Index = make([]byte, n)
				l.IndexDigest = blockdev.Sum(l.Index)
			}
			img.Layers = append(img.Layers, l)
		}
		return img
	}
	img := newImage(relayFrom, 0, 5)
	s.relay(t.Context(), "p", img)
	sum := blockdev.Sum(make([]byte, 5))
	if l := img.Layers; len(img.Relays) != 1 || l[0].Index != nil || l[0].IndexSize != relayFrom || l[1].IndexSize != 0 || l[2].IndexSize != 5 || l[2].IndexDigest != sum {
		t.Errorf("%+v", img)
	}
	for what, img := range map[string]*image.Image{"little": newImage(relayFrom-2, 1), "nothing": newImage(0)} {
		s.relay(t.Context(), "p", img)
		if len(img.Relays) > 0 || img.Layers[0].IndexSize > 0 {
			t.Errorf("%s: %+v", what, img)
		}
	}
	relays = nil
	img = newImage(relayFrom)
	s.relay(t.Context(), "p", img)
	if img.Layers[0].Index == nil {
		t.Error("nobody has the index, and it is left out")
	}
}
