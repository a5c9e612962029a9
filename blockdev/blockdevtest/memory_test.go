package blockdevtest_test

import (
	"context"
	"errors"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

func TestMemory(t *testing.T) {
	blockdevtest.TestSource(t, func(_ *testing.T, data [][]byte) blockdev.Source {
		m := new(blockdevtest.Memory)
		for _, d := range data {
			m.Put(d)
		}
		return m
	})
}

func TestMemoryRecordsRequests(t *testing.T) {
	ix, data := blockdevtest.Diff(1, 1<<20)
	var m blockdevtest.Memory
	m.PutDiff(ix, data)
	m.Record()
	req := blockdev.Request{Diff: ix.DiffID, Priority: blockdev.Demand, Chunks: ix.Chunks[:2]}
	nop := func(int, []byte) error { return nil }
	if err := m.Fetch(t.Context(), req, nop); err != nil {
		t.Fatal(err)
	}
	got := m.Requests()
	if len(got) != 1 || got[0].Diff != ix.DiffID || len(got[0].Chunks) != 2 || got[0].Chunks[1] != ix.Chunks[1] {
		t.Fatalf("recorded %+v", got)
	}
	m.Delete(ix.Chunks[0].Digest)
	if err := m.Fetch(t.Context(), req, nop); !errors.Is(err, blockdev.ErrNotFound) {
		t.Fatalf("fetch of a deleted chunk: %v", err)
	}
}

func TestDiffIsAFunctionOfItsSeed(t *testing.T) {
	a, da := blockdevtest.Diff(5, 3<<20)
	b, db := blockdevtest.Diff(5, 3<<20)
	if string(da) != string(db) || len(a.Chunks) != len(b.Chunks) {
		t.Fatal("the same seed gave two different diffs")
	}
	var off int64
	for i, c := range a.Chunks {
		if c != b.Chunks[i] || c.Offset != off || c.Length == 0 || c.Length > blockdev.MaxChunk {
			t.Fatalf("chunk %d: %+v", i, c)
		}
		off += int64(c.Length)
	}
	if off != a.DiffSize {
		t.Fatalf("chunks end at %d of %d", off, a.DiffSize)
	}
}

func TestSourceFunc(t *testing.T) {
	want := errors.New("down")
	src := blockdevtest.SourceFunc(func(context.Context, blockdev.Request, blockdev.Deliver) error { return want })
	if err := src.Fetch(t.Context(), blockdev.Request{}, nil); !errors.Is(err, want) {
		t.Fatal(err)
	}
}
