package table

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"sort"

	"github.com/shoalfs/shoal/blockdev"
)

// baseShift: the full 64-bit start is kept for every 64th chunk. 64 chunks of
// MaxChunk are 16 MiB, so the low 32 bits say where the others start.
const baseShift = 6

// Memory is what newTable needs for a chunk, in bytes: the table and, while it is
// made, what is sorted.
const Memory = 42 + 16

// Table is a chunk table in about 42 bytes a chunk: 32 for the digest, 4 for
// the start, 4 for the order by digest, 1.5 for the filter.
type Table struct {
	Size    int64    // bytes in the masked diff
	low     []uint32 // low 32 bits of the start of each chunk, and of size
	base    []int64
	digests []blockdev.Digest
	order   []uint32 // chunk numbers sorted by digest
	filter  filter
}

// New copies what it needs of an index, which it does not trust.
func New(ix *blockdev.Index) (*Table, error) {
	n := len(ix.Chunks)
	t := &Table{
		Size:    ix.DiffSize,
		low:     make([]uint32, n+1),
		base:    make([]int64, n>>baseShift+1),
		digests: make([]blockdev.Digest, n),
		order:   make([]uint32, n),
		filter:  newFilter(n),
	}
	type key struct {
		prefix uint64
		chunk  uint32
	}
	keys := make([]key, n)
	var off int64
	for i := range ix.Chunks {
		c := &ix.Chunks[i]
		if c.Offset != off || c.Length == 0 || c.Length > blockdev.MaxChunk {
			return nil, fmt.Errorf("chunk %d of %d: offset %d and length %d, want offset %d and a length of 1 to %d: %w",
				i, n, c.Offset, c.Length, off, blockdev.MaxChunk, blockdev.ErrCorrupt)
		}
		t.setStart(i, off)
		t.digests[i] = c.Digest
		t.filter.add(&c.Digest)
		keys[i] = key{binary.BigEndian.Uint64(c.Digest[:8]), uint32(i)}
		off += int64(c.Length)
	}
	if off != ix.DiffSize {
		return nil, fmt.Errorf("chunks end at %d, the diff at %d: %w", off, ix.DiffSize, blockdev.ErrCorrupt)
	}
	t.setStart(n, off)
	// The prefix decides nearly always, and is compared without a look at the
	// digest.
	slices.SortFunc(keys, func(a, b key) int {
		if a.prefix != b.prefix {
			return cmp.Compare(a.prefix, b.prefix)
		}
		return cmp.Or(bytes.Compare(t.digests[a.chunk][:], t.digests[b.chunk][:]), cmp.Compare(a.chunk, b.chunk))
	})
	for i, k := range keys {
		t.order[i] = k.chunk
	}
	return t, nil
}

func (t *Table) setStart(i int, off int64) {
	t.low[i] = uint32(off)
	if i&(1<<baseShift-1) == 0 {
		t.base[i>>baseShift] = off
	}
}

// Len is how many chunks there are.
func (t *Table) Len() int { return len(t.digests) }

// Start is the offset of chunk i; start(len()) is the end of the diff.
func (t *Table) Start(i int) int64 {
	b := t.base[i>>baseShift]
	return b + int64(t.low[i]-uint32(b))
}

// Length is that of chunk i in bytes.
func (t *Table) Length(i int) int { return int(t.low[i+1] - t.low[i]) }

// Chunk is chunk i as the index has it.
func (t *Table) Chunk(i int) blockdev.Chunk {
	return blockdev.Chunk{Offset: t.Start(i), Length: uint32(t.Length(i)), Digest: t.digests[i]}
}

// Digest is that of chunk i.
func (t *Table) Digest(i int) blockdev.Digest { return t.digests[i] }

// Check reports whether b is chunk i.
func (t *Table) Check(i int, b []byte) bool {
	return len(b) == t.Length(i) && blockdev.Sum(b) == t.digests[i]
}

// At is the number of the chunk that holds the byte at off, which must lie
// within the diff.
func (t *Table) At(off int64) int {
	lo, hi := 0, len(t.digests)-1
	for lo < hi {
		mid := int(uint(lo+hi+1) >> 1)
		if t.Start(mid) <= off {
			lo = mid
		} else {
			hi = mid - 1
		}
	}
	return lo
}

// Span is the range of chunks [lo, hi) that hold the bytes [off, end); end is
// cut off at the end of the diff, behind which there are no chunks.
func (t *Table) Span(off, end int64) (lo, hi int) {
	end = min(end, t.Size)
	if off >= end {
		return 0, 0
	}
	lo = t.At(off)
	for hi = lo + 1; hi < len(t.digests) && t.Start(hi) < end; {
		hi++
	}
	return lo, hi
}

// Find returns the part of order whose chunks have digest d.
func (t *Table) Find(d *blockdev.Digest) []uint32 {
	if !t.filter.has(d) {
		return nil
	}
	from := sort.Search(len(t.order), func(k int) bool {
		return bytes.Compare(t.digests[t.order[k]][:], d[:]) >= 0
	})
	to := from
	for to < len(t.order) && t.digests[t.order[to]] == *d {
		to++
	}
	return t.order[from:to]
}
