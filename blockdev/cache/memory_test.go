package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// bomb is an index of a diff of n bytes of which nothing is true but its DiffID, whose
// tree decodes to size bytes, of next to none.
func bomb(n, size int64) *blockdev.Index {
	data := make([]byte, n)
	return &blockdev.Index{
		DiffID: blockdev.Sum(data), DiffSize: n, Meta: make([]byte, size),
		Chunks: []blockdev.Chunk{{Length: uint32(n), Digest: blockdev.Sum(data)}},
	}
}

// TestIndexMemory: pulls together decode no more than IndexBytes, and an index that
// needs more than that has the memory for itself.
func TestIndexMemory(t *testing.T) {
	const tree = 4 << 20
	r := newRig(t, 1<<20, func(c *Config) { c.IndexBytes = 3 * tree })
	var now, most, alone atomic.Int64
	var wg sync.WaitGroup
	for i := range int64(24) {
		size := int64(tree - 1024)
		if i%6 == 5 {
			size = 5 * tree
		}
		enc := encode(t, bomb(100+i, size))
		wg.Go(func() {
			_, err := r.AddChecked(t.Context(), enc, func(ix *blockdev.Index) error {
				n := int64(len(ix.Meta))
				defer now.Add(-n)
				sum := now.Add(n)
				for {
					if old := most.Load(); sum <= old || most.CompareAndSwap(old, sum) {
						break
					}
				}
				if n > tree && sum == n {
					alone.Add(1)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most.Load() > 5*tree || alone.Load() != 4 {
		t.Errorf("%d bytes of trees at a time, %d of 4 large ones were alone", most.Load(), alone.Load())
	}
}

// TestIndexMemoryAtStart: so does the cache when it opens what is there, and a diff whose
// index would not be taken in any more is still opened.
func TestIndexMemoryAtStart(t *testing.T) {
	r := newRig(t, 1<<20, nil)
	const n = 8
	for i := range int64(n) {
		r.add(bomb(100+i, 4<<20))
	}
	r.cfg.IndexBytes, r.cfg.MaxTree = 4<<20, 1<<20
	opened := func() int { return len(*r.list.Load()) }
	for tries, caught := 0, false; !caught; tries++ {
		if tries == 100 {
			t.Fatal("the cache was never seen while it opened its diffs")
		}
		r.close()
		c, err := Open(t.Context(), r.cfg)
		if err != nil {
			t.Fatal(err)
		}
		r.Cache = c
		if err := r.decoding.Acquire(t.Context(), 1); err != nil { // of all, which each of them needs
			t.Fatal(err)
		}
		before := opened()
		if caught = before < n; caught {
			time.Sleep(50 * time.Millisecond)
			if now := opened(); now > before+1 { // one may have been about to be listed
				t.Errorf("%d diffs were opened while there was no memory for it", now-before)
			}
		}
		r.decoding.Release(1)
	}
	<-r.opened
	if got := len(r.Diffs()); got != n+1 {
		t.Errorf("%d diffs are open, want %d", got, n+1)
	}
	r.expect()
}

// TestIndexTooLarge: what would need too much is refused by its header, so that
// containerd unpacks the image.
func TestIndexTooLarge(t *testing.T) {
	r := newRig(t, 1<<20, func(c *Config) { c.MaxTree = 1 << 20 })
	for name, ix := range map[string]*blockdev.Index{
		"metadata": bomb(100, 1<<20+1),
		"implied": func() *blockdev.Index {
			ix := bomb(100, 1<<20-10)
			ix.Implied = []string{"a/directory"}
			return ix
		}(),
	} {
		_, err := r.AddChecked(t.Context(), encode(t, ix), func(*blockdev.Index) error {
			t.Errorf("%s: decoded", name)
			return nil
		})
		if !errors.Is(err, blockdev.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.cfg.MaxTree, r.cfg.MaxIndex = 0, 1<<20
	r.reopen()
	if _, err := r.Add(t.Context(), encode(t, bomb(100, 1<<20))); !errors.Is(err, blockdev.ErrUnsupported) {
		t.Errorf("memory: %v", err)
	}
}

// TestIndexMemoryWait: who waits for memory can leave, and a check that fails takes
// nothing in and keeps nothing.
func TestIndexMemoryWait(t *testing.T) {
	r := newRig(t, 1<<20, func(c *Config) { c.IndexBytes = 1 << 20 })
	ctx, cancel := context.WithCancel(t.Context())
	boom := errors.New("boom")
	enc := encode(t, bomb(100, 1<<20))
	_, err := r.AddChecked(t.Context(), enc, func(*blockdev.Index) error {
		go cancel()
		if _, err := r.Add(ctx, encode(t, bomb(101, 1<<20))); !errors.Is(err, context.Canceled) {
			t.Errorf("while there is no memory: %v", err)
		}
		return boom
	})
	if !errors.Is(err, boom) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(filepath.Join(r.cfg.Root, diffsDir, bomb(100, 0).DiffID.Hex())); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was refused is on disk: %v", err)
	}
	if !r.decoding.TryAcquire(r.Cache.cfg.IndexBytes) {
		t.Error("memory was not given back")
	}
}
