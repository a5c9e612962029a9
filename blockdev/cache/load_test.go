package cache

import (
	"context"
	"slices"
	"sync"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

// TestOpenOnDemand asks for diffs right after Open, before they have been opened:
// they are there, once, however many ask, and whatever they want of them.
func TestOpenOnDemand(t *testing.T) {
	r := newRig(t, 300_000, nil)
	ids := []blockdev.Digest{r.d.ID()}
	byID := map[blockdev.Digest]*blockdev.Index{r.d.ID(): r.ix}
	for k := range 20 {
		ix, data := blockdevtest.Diff(uint64(100+k), 200_000)
		r.mem.PutDiff(ix, data)
		ids = append(ids, r.add(ix).ID())
		byID[ix.DiffID] = ix
	}
	r.close()
	c, err := Open(context.Background(), r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Cache = c
	if known := c.Known(); len(known) != len(ids) {
		t.Errorf("%d diffs are known, want %d", len(known), len(ids))
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := make(map[blockdev.Digest][]*Diff)
	for i := range 4 {
		wg.Go(func() {
			for _, id := range ids {
				d, ok := c.Get(id)
				if i == 0 {
					var err error
					d, err = c.Add(context.Background(), encode(t, byID[id]))
					ok = err == nil
				}
				if !ok {
					t.Errorf("%v is not there", id)
				}
				mu.Lock()
				got[id] = append(got[id], d)
				mu.Unlock()
			}
		})
	}
	all := c.Diffs()
	wg.Wait()
	if len(all) != len(ids) || len(c.Known()) != len(ids) {
		t.Errorf("%d diffs, %d known, want %d", len(all), len(c.Known()), len(ids))
	}
	for id, ds := range got {
		if !slices.Contains(all, ds[0]) || slices.ContainsFunc(ds, func(d *Diff) bool { return d != ds[0] }) {
			t.Errorf("%v was opened more than once", id)
		}
	}
	if err := c.Remove(context.Background(), ids[1]); err != nil {
		t.Error(err)
	}
	if _, ok := c.Get(ids[1]); ok || len(c.Known()) != len(ids)-1 {
		t.Error("a removed diff is still known")
	}
}

// TestCloseWhileOpening: what has not been opened is not.
func TestCloseWhileOpening(t *testing.T) {
	r := newRig(t, 300_000, nil)
	for range 5 {
		r.close()
		c, err := Open(context.Background(), r.cfg)
		if err != nil {
			t.Fatal(err)
		}
		r.Cache = c
	}
	r.close()
	r.open()
	if _, ok := r.Get(r.ix.DiffID); !ok {
		t.Error("the diff is lost")
	}
}
