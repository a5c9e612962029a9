package table

import (
	"encoding/binary"

	"github.com/shoalfs/shoal/blockdev"
)

// filter is a Bloom filter of a diff's digests: 12 bits and 4 hashes a chunk, all
// in one cache line, about 1 % false positives. A fresh image's chunks are looked
// up in every diff of the node, and most of these say no at the cost of one
// memory access. Digests are their own hashes; a hostile index can only make
// lookups slower.
type filter [][8]uint64

func newFilter(n int) filter { return make(filter, (n*12+511)/512) }

// place returns the cache line and the four bits of a digest.
func (f filter) place(d *blockdev.Digest) (line *[8]uint64, bits uint64) {
	h := binary.LittleEndian.Uint32(d[8:])
	return &f[uint64(h)*uint64(len(f))>>32], binary.LittleEndian.Uint64(d[16:])
}

func (f filter) add(d *blockdev.Digest) {
	line, bits := f.place(d)
	for range 4 {
		line[bits>>6&7] |= 1 << (bits & 63)
		bits >>= 9
	}
}

func (f filter) has(d *blockdev.Digest) bool {
	if len(f) == 0 {
		return false
	}
	line, bits := f.place(d)
	for range 4 {
		if line[bits>>6&7]&(1<<(bits&63)) == 0 {
			return false
		}
		bits >>= 9
	}
	return true
}
