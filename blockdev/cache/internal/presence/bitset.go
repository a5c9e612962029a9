package presence

import (
	"math/bits"
	"sync/atomic"
)

// perRecord is how many chunks one word of a bitset, and one record of the
// bitmap file, speaks for.
const perRecord = 32

// Bitset has a bit per chunk. Single bits may be read while others change them.
type Bitset []atomic.Uint32

// records is how many words a bitset of n chunks has, and records a bitmap file.
func records(n int) int { return (n + perRecord - 1) / perRecord }

// NewBitset is for n chunks.
func NewBitset(n int) Bitset { return make(Bitset, records(n)) }

// Get reports whether bit i is set.
func (b Bitset) Get(i int) bool {
	return b[i/perRecord].Load()&(1<<(i%perRecord)) != 0
}

// Set sets bit i.
func (b Bitset) Set(i int) { b[i/perRecord].Or(1 << (i % perRecord)) }

func (b Bitset) unset(i int) { b[i/perRecord].And(^uint32(1 << (i % perRecord))) }

// All reports whether the bits [lo, hi) are set.
func (b Bitset) All(lo, hi int) bool {
	for lo < hi {
		g, from := lo/perRecord, lo%perRecord
		n := min(perRecord-from, hi-lo)
		mask := uint32((uint64(1)<<n - 1) << from)
		if b[g].Load()&mask != mask {
			return false
		}
		lo += n
	}
	return true
}

// next is the first clear bit in [i, n), or n.
func (b Bitset) nextClear(i, n int) int {
	for i < n {
		w := ^b[i/perRecord].Load() >> (i % perRecord)
		if w != 0 {
			return min(i+bits.TrailingZeros32(w), n)
		}
		i = (i/perRecord + 1) * perRecord
	}
	return n
}

// nextSet is the first set bit in [i, n), or n.
func (b Bitset) nextSet(i, n int) int {
	for i < n {
		w := b[i/perRecord].Load() >> (i % perRecord)
		if w != 0 {
			return min(i+bits.TrailingZeros32(w), n)
		}
		i = (i/perRecord + 1) * perRecord
	}
	return n
}
