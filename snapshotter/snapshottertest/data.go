// Package snapshottertest checks implementations of the snapshotter's contracts.
//
// TestData is the conformance suite of images.Data. volume.Manager runs it, and so does
// the stand-in that the snapshotter's own tests use. The suite asks for nothing that the
// comments of images.Data do not promise; where both disagree, the comments are right.
package snapshottertest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// NewData makes a data path that has no diff, and whose sources have all bytes of these
// layers. It returns it with the layers' encoded indexes.
type NewData func(t *testing.T, layers ...*blockdevtest.Layer) (data images.Data, encoded [][]byte)

// TestData checks a data path.
func TestData(t *testing.T, open NewData) {
	for name, test := range map[string]func(*testing.T, NewData){
		"Add": testAdd, "AddChecked": testCheck, "Mount": testMount, "Remove": testRemove, "Use": testUse,
		"Prefetch": testPrefetch, "PrefetchWait": testPrefetchWait, "Absent": testAbsent, "Concurrent": testConcurrent,
	} {
		t.Run(name, func(t *testing.T) { test(t, open) })
	}
}

// path is that of the one file of newLayer, in a directory that the layer has no entry
// for.
const path = "dir/file"

func newLayer(t *testing.T, seed uint64) *blockdevtest.Layer {
	t.Helper()
	l, err := blockdevtest.NewLayer(blockdevtest.File{Name: path, Data: blockdevtest.Bytes(seed, 100_000)})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func anyIndex(*blockdev.Index) error { return nil }

// fixture is a data path that has one diff.
func fixture(t *testing.T, open NewData) (images.Data, *blockdevtest.Layer) {
	t.Helper()
	l := newLayer(t, 1)
	data, encoded := open(t, l)
	if id, err := data.AddChecked(t.Context(), encoded[0], anyIndex); err != nil || id != l.Index.DiffID {
		t.Fatalf("added %v: %v", id, err)
	}
	return data, l
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 3000 {
		if done() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s: it has not happened", what)
}

func testAdd(t *testing.T, open NewData) {
	a, b := newLayer(t, 1), newLayer(t, 2)
	data, encoded := open(t, a, b)
	if data.Has(a.Index.DiffID) || len(data.Diffs()) != 0 {
		t.Error("it has a diff before the first was added")
	}
	for i, l := range []*blockdevtest.Layer{a, b, a} { // one of them twice
		enc := slices.Clone(encoded[i%2])
		id, err := data.AddChecked(t.Context(), enc, anyIndex)
		if err != nil || id != l.Index.DiffID {
			t.Fatalf("added %v, want %v: %v", id, l.Index.DiffID, err)
		}
		clear(enc) // the slice is the caller's
		if !data.Has(id) {
			t.Error("what was added is not there")
		}
		if implied, err := data.Implied(id); err != nil || !slices.Equal(implied, l.Index.Implied) {
			t.Errorf("implied directories are %v, want %v: %v", implied, l.Index.Implied, err)
		}
	}
	if ids := data.Diffs(); len(ids) != 2 || !slices.Contains(ids, a.Index.DiffID) || !slices.Contains(ids, b.Index.DiffID) {
		t.Errorf("it has %v", ids)
	}
}

func testCheck(t *testing.T, open NewData) {
	l := newLayer(t, 1)
	data, encoded := open(t, l)
	wrong := errors.New("another diff was asked for")
	calls := 0
	_, err := data.AddChecked(t.Context(), encoded[0], func(ix *blockdev.Index) error {
		if calls++; ix.DiffID != l.Index.DiffID || !slices.Equal(ix.Implied, l.Index.Implied) {
			t.Errorf("shown the index of %v", ix.DiffID)
		}
		return wrong
	})
	if !errors.Is(err, wrong) || calls != 1 {
		t.Errorf("check was called %d times, and its error became %v", calls, err)
	}
	if _, err := data.AddChecked(t.Context(), encoded[0][:len(encoded[0])/2], func(*blockdev.Index) error {
		t.Error("half an index is shown as one")
		return nil
	}); err == nil {
		t.Error("half an index is added")
	}
	if data.Has(l.Index.DiffID) || len(data.Diffs()) != 0 {
		t.Error("what was refused is there")
	}
}

func testMount(t *testing.T, open NewData) {
	data, l := fixture(t, open)
	dir, err := data.Mount(t.Context(), l.Index.DiffID)
	if err != nil || !filepath.IsAbs(dir) {
		t.Fatalf("mounted at %q: %v", dir, err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, path)); err != nil || !slices.Equal(got, blockdevtest.Bytes(1, len(got))) || len(got) == 0 {
		t.Errorf("a file of the diff has %d bytes, which are wrong: %v", len(got), err)
	}
	if again, err := data.Mount(t.Context(), l.Index.DiffID); err != nil || again != dir {
		t.Errorf("mounted at %q and then at %q: %v", dir, again, err)
	}
}

func testRemove(t *testing.T, open NewData) {
	data, l := fixture(t, open)
	id := l.Index.DiffID
	dir, err := data.Mount(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is not there
		if err := data.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, path)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file of a removed diff: %v", err)
	}
	if _, err := data.Mount(t.Context(), id); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("Mount of a removed diff: %v", err)
	}
	if data.Has(id) || data.Incomplete(id) || len(data.Diffs()) != 0 {
		t.Error("a removed diff is there")
	}
}

func testUse(t *testing.T, open NewData) {
	data, l := fixture(t, open)
	if bytes, inodes, err := data.FullUse(l.Index.DiffID); err != nil || bytes <= 0 || inodes <= 0 {
		t.Errorf("%d bytes, %d inodes: %v", bytes, inodes, err)
	}
}

func testPrefetch(t *testing.T, open NewData) {
	data, l := fixture(t, open)
	id := l.Index.DiffID
	if !data.Incomplete(id) {
		t.Error("no byte of the diff was asked for, and all are there")
	}
	data.StopPrefetch(id) // nothing has begun
	data.ContainerStarts(id)
	data.FetchStartup([]blockdev.DiffProfile{{Diff: id, Profile: blockdev.Profile{{Chunk: 0, Rank: 0}}}})
	data.Prefetch(id, id)
	eventually(t, "all bytes are fetched", func() bool { return !data.Incomplete(id) })
	data.StopPrefetch(id)
	if data.Prefetch(id); data.Incomplete(id) {
		t.Error("what has come does not stay")
	}
}

func testPrefetchWait(t *testing.T, open NewData) {
	data, l := fixture(t, open)
	var local, total int64
	err := data.PrefetchWait(t.Context(), l.Index.DiffID, func(l, t int64) { local, total = l, t })
	if err != nil || local != total || total <= 0 {
		t.Errorf("%d of %d bytes: %v", local, total, err)
	}
	if data.Incomplete(l.Index.DiffID) {
		t.Error("bytes are missing")
	}
	if err := data.PrefetchWait(t.Context(), l.Index.DiffID, nil); err != nil {
		t.Errorf("of what is here: %v", err)
	}
}

// testAbsent: what is not there is passed over, or not found.
func testAbsent(t *testing.T, open NewData) {
	data, _ := fixture(t, open)
	none := blockdev.Sum([]byte("none"))
	data.Prefetch(none)
	data.StopPrefetch(none)
	data.ContainerStarts(none)
	if data.Has(none) || data.Incomplete(none) {
		t.Error("a diff is there that was never added")
	}
	_, mount := data.Mount(t.Context(), none)
	_, implied := data.Implied(none)
	_, _, use := data.FullUse(none)
	for what, err := range map[string]error{
		"Mount": mount, "Implied": implied, "FullUse": use, "PrefetchWait": data.PrefetchWait(t.Context(), none, nil),
	} {
		if !errors.Is(err, blockdev.ErrNotFound) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := data.Remove(t.Context(), none); err != nil {
		t.Errorf("Remove: %v", err)
	}
}

// testConcurrent: adding, mounting and removing one diff at the same time ends, and
// leaves it as the last call does.
func testConcurrent(t *testing.T, open NewData) {
	l := newLayer(t, 1)
	data, encoded := open(t, l)
	id := l.Index.DiffID
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			var err error
			switch i % 3 {
			case 0:
				_, err = data.AddChecked(t.Context(), encoded[0], anyIndex)
			case 1:
				if _, err = data.Mount(t.Context(), id); errors.Is(err, blockdev.ErrNotFound) {
					err = nil
				}
			case 2:
				data.Prefetch(id)
				err = data.Remove(t.Context(), id)
			}
			if err != nil {
				t.Error(fmt.Errorf("call %d: %w", i, err))
			}
		})
	}
	wg.Wait()
	if _, err := data.AddChecked(t.Context(), encoded[0], anyIndex); err != nil {
		t.Fatal(err)
	}
	if _, err := data.Mount(t.Context(), id); err != nil {
		t.Error(err)
	}
}
