package supernode

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestPinned: what is pinned is bounded, is not evicted or removed, also after a restart, and
// a list that cannot be read is an error.
func TestPinned(t *testing.T) {
	f := registrytest.NewFake(t)
	a, b := registrytest.GzipLayer(t, "a", 300_000, 1), registrytest.GzipLayer(t, "b", 300_000, 2)
	f.Push(t, "a", "v1", a)
	f.Push(t, "b", "v1", a, b)
	dir := filepath.Join(t.TempDir(), "data")
	s, err := New(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	reqA, reqB := request(f.Target, "a:v1", nobody), request(f.Target, "b:v1", nobody)
	wantErr(t, s.Stock().Pin(t.Context(), reqA), blockdev.ErrNotFound, "shoal prefetch")
	for _, req := range []image.Request{reqA, reqB} {
		if _, err := s.FetchIndexes(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		if err := s.Stock().Pin(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	// The layer that both have counts once.
	var size int64
	for _, d := range s.stock.pinned.images[reqB.Ref].Diffs {
		size += d.Size
	}
	if err := s.stock.pinned.set(s.stock.pinned.images[reqA.Ref], size); err != nil {
		t.Error(err)
	}
	wantErr(t, s.stock.pinned.set(pinnedImage{Ref: "x", Diffs: []pinnedDiff{{blockdev.Digest{1}, 1}}}, size), blockdev.ErrNoSpace, "unpin others", "store.quota")
	if len(s.stock.pinned.images) != 2 {
		t.Errorf("%d images are pinned", len(s.stock.pinned.images))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = start(t, at(dir))
	if _, err := s.Stock().RemoveDigest(a.DiffID); err == nil || !strings.Contains(err.Error(), reqA.Ref) {
		t.Errorf("a pinned diff is removed: %v", err)
	}
	if err := s.Stock().Unpin(reqB.Ref); err != nil {
		t.Error(err)
	}
	wantErr(t, s.Stock().Unpin(reqB.Ref), blockdev.ErrNotFound)
	if _, err := s.Stock().RemoveDigest(blockdev.Sum(b.Blob)); err != nil {
		t.Error(err)
	}
	left := s.Stock().Layers()
	if len(left) != 1 || !left[0].Pinned || left[0].DiffID != a.DiffID {
		t.Errorf("left is %+v", left)
	}
	if err := os.WriteFile(filepath.Join(dir, pinnedFile), []byte("["), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openPinned(dir, s.store.Pin); err == nil || !strings.Contains(err.Error(), pinnedFile) {
		t.Errorf("a broken list: %v", err)
	}
}
