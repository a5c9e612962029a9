package gunzip

import "math/bits"

// A decoding table has an entry for every value of the next bits of the input: of
// litBits or distBits bits, and for longer codes, of as many more as the codes with
// these first bits have, in a second table behind the first.
//
// An entry, from its lowest bit on:
//
//	0-7    bits to consume: of the code (in this table) and its extra bits
//	8-11   of these, the bits of the code; of a link, the bits of the second table
//	13     end of the block (with exceptional)
//	14     link to a second table (with exceptional)
//	15     exceptional: neither literal nor length nor distance
//	16-30  the literal, the base of a length or distance, or where a second table is
//	31     literal
//
// An exceptional entry that is neither an end nor a link is no code.
const (
	flagEnd         = 1 << 13
	flagLink        = 1 << 14
	flagExceptional = 1 << 15
	flagLiteral     = 1 << 31

	noCode = flagExceptional

	maxCode  = 15 // bits of the longest code (RFC 1951, 3.2.7)
	litBits  = 11
	distBits = 8
	preBits  = 7 // the longest code of code lengths

	// How large tables with their second tables can get, as zlib's program "enough"
	// counts it: of 288 symbols, 11 bits of at most 15, and of 32 symbols, 8 of 15.
	litEntries  = 2342
	distEntries = 402

	numLit  = 288
	numDist = 32
	numPre  = 19
	maxLit  = 286 // symbols that a block may have codes for
	maxDist = 30
)

// The values of symbols in entries, with the number of extra bits in bits 0-7.
var (
	litValues  = makeLitValues()
	distValues = makeDistValues()
	preValues  = makePreValues()
)

func makeLitValues() (v [numLit]uint32) {
	for i := range 256 {
		v[i] = flagLiteral | uint32(i)<<16
	}
	v[256] = flagExceptional | flagEnd
	base, extra := uint32(3), uint32(0)
	for i := 257; i < 285; i++ {
		v[i] = base<<16 | extra
		base += 1 << extra
		if i >= 264 && (i-264)%4 == 0 {
			extra++
		}
	}
	v[285] = 258 << 16
	v[286], v[287] = noCode, noCode
	return v
}

func makeDistValues() (v [numDist]uint32) {
	base, extra := uint32(1), uint32(0)
	for i := range maxDist {
		v[i] = base<<16 | extra
		base += 1 << extra
		if i >= 3 && i%2 == 1 {
			extra++
		}
	}
	v[30], v[31] = noCode, noCode
	return v
}

func makePreValues() (v [numPre]uint32) {
	for i := range v {
		v[i] = uint32(i) << 16
	}
	return v
}

// makeTable fills table for codes of the given lengths (0: no code), the first
// 1<<root entries of it with the first table. It returns false if these lengths are
// no prefix code. As in compress/flate, a code must be complete, but may be empty or
// a single code of one bit.
func makeTable(table []uint32, root int, lengths []uint8, values []uint32) bool {
	var count, place [maxCode + 1]int
	longest := 0
	for _, n := range lengths {
		count[n]++
		longest = max(longest, int(n))
	}
	count[0] = 0
	first := table[:1<<root]
	left := 1
	for n := 1; n <= longest; n++ {
		place[n] = place[n-1] + count[n-1]
		if left = left<<1 - count[n]; left < 0 {
			return false
		}
	}
	if left > 0 && longest > 1 {
		return false
	}
	if left > 0 {
		fill(first, noCode)
	}
	// In the order of their codes, so that those of one second table come together.
	var sorted [numLit]uint16
	for sym, n := range lengths {
		if n > 0 {
			sorted[place[n]] = uint16(sym)
			place[n]++
		}
	}
	free := 1 << root // where the next second table goes
	link, second := -1, []uint32(nil)
	code := 0
	length := 0
	for _, sym := range sorted[:place[longest]] {
		n := int(lengths[sym])
		code <<= n - length
		length = n
		// The input has a code's first bit in its lowest.
		c := int(bits.Reverse16(uint16(code)) >> (16 - n))
		code++
		if n <= root {
			put(first, values[sym], c, n)
		} else {
			if head := c & (1<<root - 1); head != link {
				link = head
				// As many bits as it takes for the codes that are left to fill it.
				size := n - root
				for room := 1 << size; root+size < longest; room <<= 1 {
					if room -= count[root+size]; room <= 0 {
						break
					}
					size++
				}
				second = table[free : free+1<<size]
				first[head] = uint32(free)<<16 | flagExceptional | flagLink | uint32(size)<<8 | uint32(root)
				free += 1 << size
			}
			put(second, values[sym], c>>root, n-root)
		}
		count[n]--
	}
	return true
}

// put makes the entries of a code c of n bits, whatever follows it.
func put(t []uint32, value uint32, c, n int) {
	e := (value + uint32(n)) | uint32(n)<<8
	for i := c; i < len(t); i += 1 << n {
		t[i] = e
	}
}

func fill(t []uint32, v uint32) {
	for i := range t {
		t[i] = v
	}
}
