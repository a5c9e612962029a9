package table

import (
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

// TestTableFind holds the search by digest and by offset against a plain walk.
func TestTableFind(t *testing.T) {
	ix, _ := blockdevtest.Diff(3, 12<<20)
	ix.Chunks[7].Digest = ix.Chunks[20].Digest
	tab, err := New(ix)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range ix.Chunks {
		if tab.Chunk(i) != c {
			t.Fatalf("chunk %d: %+v, want %+v", i, tab.Chunk(i), c)
		}
		for _, off := range []int64{c.Offset, c.Offset + int64(c.Length) - 1} {
			if got := tab.At(off); got != i {
				t.Fatalf("offset %d is in chunk %d, want %d", off, got, i)
			}
		}
		want := 1
		if i == 7 || i == 20 {
			want = 2
		}
		found := tab.Find(&c.Digest)
		if len(found) != want {
			t.Fatalf("chunk %d: found %v", i, found)
		}
		for _, k := range found {
			if tab.digests[k] != c.Digest {
				t.Fatalf("chunk %d: found %d", i, k)
			}
		}
	}
	unknown := blockdev.Sum([]byte("unknown"))
	if found := tab.Find(&unknown); len(found) != 0 {
		t.Errorf("found %v", found)
	}
	if lo, hi := tab.Span(tab.Size-1, tab.Size+100); lo != tab.Len()-1 || hi != tab.Len() {
		t.Errorf("span at the end: %d, %d", lo, hi)
	}
}

// TestTableBeyond4GiB: starts are kept in 32 bits each.
func TestTableBeyond4GiB(t *testing.T) {
	ix := new(blockdev.Index)
	for i := range 40_000 {
		n := uint32(blockdev.MaxChunk - i%1000)
		ix.Chunks = append(ix.Chunks, blockdev.Chunk{Offset: ix.DiffSize, Length: n, Digest: blockdev.Digest{byte(i), byte(i >> 8)}})
		ix.DiffSize += int64(n)
	}
	tab, err := New(ix)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range ix.Chunks {
		if tab.Chunk(i) != c || tab.At(c.Offset) != i {
			t.Fatalf("chunk %d: %+v, want %+v", i, tab.Chunk(i), c)
		}
	}
	if tab.Start(tab.Len()) != ix.DiffSize {
		t.Error("wrong end")
	}
}

func TestTableRefuses(t *testing.T) {
	for name, change := range map[string]func(*blockdev.Index){
		"gap":      func(ix *blockdev.Index) { ix.Chunks[3].Offset++ },
		"empty":    func(ix *blockdev.Index) { ix.Chunks[3].Length = 0 },
		"too long": func(ix *blockdev.Index) { ix.Chunks[3].Length = blockdev.MaxChunk + 1 },
		"short":    func(ix *blockdev.Index) { ix.Chunks = ix.Chunks[:5] },
		"size":     func(ix *blockdev.Index) { ix.DiffSize++ },
	} {
		ix, _ := blockdevtest.Diff(3, 1<<20)
		change(ix)
		if _, err := New(ix); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestMemoryOfATable: a node has millions of chunks.
func TestMemoryOfATable(t *testing.T) {
	ix, _ := blockdevtest.Diff(3, 32<<20)
	tab, err := New(ix)
	if err != nil {
		t.Fatal(err)
	}
	sum := 4*cap(tab.low) + 8*cap(tab.base) + 32*cap(tab.digests) + 4*cap(tab.order) + 64*cap(tab.filter)
	if per := float64(sum) / float64(tab.Len()); per > 43 {
		t.Errorf("%.1f bytes a chunk", per)
	}
}
