package route

import (
	"encoding/binary"
	"math/bits"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
)

// Key is a chunk (or a layer) as rendezvous hashing sees it: the first eight
// bytes of its digest, which are as good as random.
type Key uint64

// KeyOf returns the key of a digest.
func KeyOf(d blockdev.Digest) Key { return Key(binary.BigEndian.Uint64(d[:8])) }

// hashID is FNV-1a, mixed again because FNV leaves the high bits of short
// strings much alike.
func hashID(id string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(id) {
		h = (h ^ uint64(id[i])) * 1099511628211
	}
	return mix(h)
}

// mix is the finalizer of MurmurHash3: each bit of x changes each bit of the
// result with a probability of one half.
func mix(x uint64) uint64 {
	x = (x ^ x>>33) * 0xff51afd7ed558ccd
	x = (x ^ x>>33) * 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// rank is the rank of the member that hashes to h for a chunk. It is one multiplication to
// 128 bits, folded (as wyhash does), because it is computed for each member of a
// cell and each chunk.
func rank(key Key, h uint64) uint64 {
	hi, lo := bits.Mul64(uint64(key)^h, 0x9e3779b97f4a7c15)
	return hi ^ lo
}

// A packed rank has a rank in its upper bits and in its lower ones the index of
// the member that it belongs to, so that sorting needs no second array.
const (
	indexBits = 16
	indexMask = 1<<indexBits - 1
)

func pack(rank uint64, index int) uint64 { return rank&^indexMask | uint64(index) }

func indexOf(packed uint64) int { return int(packed & indexMask) }

// nth puts the k-th highest of s (from 0) at s[k], everything higher before it,
// and returns it. Quickselect, with the median of three as pivot.
func nth(s []uint64, k int) uint64 {
	for len(s) > 12 {
		a, b, c := s[0], s[len(s)/2], s[len(s)-1]
		pivot := max(min(a, b), min(max(a, b), c))
		i, j := 0, len(s)-1
		for i <= j {
			for s[i] > pivot {
				i++
			}
			for s[j] < pivot {
				j--
			}
			if i <= j {
				s[i], s[j] = s[j], s[i]
				i++
				j--
			}
		}
		switch {
		case k <= j:
			s = s[:j+1]
		case k >= i:
			s, k = s[i:], k-i
		default:
			return s[k]
		}
	}
	for i := 1; i < len(s); i++ {
		for j := i; j > 0 && s[j] > s[j-1]; j-- {
			s[j], s[j-1] = s[j-1], s[j]
		}
	}
	return s[k]
}

// descending sorts s, highest first.
func descending(s []uint64) {
	slices.Sort(s)
	slices.Reverse(s)
}
