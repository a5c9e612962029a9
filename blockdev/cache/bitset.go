package cache

import (
	"math/bits"
	"sync/atomic"
)

// groupBits is how many chunks one word of a bitset, and one record of the
// bitmap file, speaks for.
const groupBits = 32

// bitset has a bit per chunk. Single bits may be read while others change them.
type bitset []atomic.Uint32

func groups(n int) int { return (n + groupBits - 1) / groupBits }

func newBitset(n int) bitset { return make(bitset, groups(n)) }

func (b bitset) get(i int) bool {
	return b[i/groupBits].Load()&(1<<(i%groupBits)) != 0
}

func (b bitset) set(i int) { b[i/groupBits].Or(1 << (i % groupBits)) }

func (b bitset) unset(i int) { b[i/groupBits].And(^uint32(1 << (i % groupBits))) }

// all reports whether the bits [lo, hi) are set.
func (b bitset) all(lo, hi int) bool {
	for lo < hi {
		g, from := lo/groupBits, lo%groupBits
		n := min(groupBits-from, hi-lo)
		mask := uint32((uint64(1)<<n - 1) << from)
		if b[g].Load()&mask != mask {
			return false
		}
		lo += n
	}
	return true
}

// next is the first clear bit in [i, n), or n.
func (b bitset) nextClear(i, n int) int {
	for i < n {
		w := ^b[i/groupBits].Load() >> (i % groupBits)
		if w != 0 {
			return min(i+bits.TrailingZeros32(w), n)
		}
		i = (i/groupBits + 1) * groupBits
	}
	return n
}

// nextSet is the first set bit in [i, n), or n.
func (b bitset) nextSet(i, n int) int {
	for i < n {
		w := b[i/groupBits].Load() >> (i % groupBits)
		if w != 0 {
			return min(i+bits.TrailingZeros32(w), n)
		}
		i = (i/groupBits + 1) * groupBits
	}
	return n
}
