package profile

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
)

// MaxEncoded is the longest encoded profile, in bytes: each number has at most
// five.
const MaxEncoded = blockdev.MaxProfile * 2 * binary.MaxVarintLen32

// Append appends the encoded profile to dst. It must follow the rules that
// Decode checks.
func Append(dst []byte, p blockdev.Profile) []byte {
	var last blockdev.Touch
	for _, t := range p {
		dst = binary.AppendVarint(dst, int64(t.Chunk)-int64(last.Chunk))
		dst = binary.AppendUvarint(dst, uint64(t.Rank-last.Rank))
		last = t
	}
	return dst
}

// Decode reads an encoded profile of a diff with so many chunks; where they are
// not known, math.MaxUint32 makes it take any number.
func Decode(b []byte, chunks uint32) (blockdev.Profile, error) {
	if len(b) > MaxEncoded {
		return nil, fmt.Errorf("startup profile of %d bytes, at most %d are allowed: %w", len(b), MaxEncoded, blockdev.ErrCorrupt)
	}
	p, err := decode(b, chunks)
	if err != nil {
		return nil, fmt.Errorf("startup profile: row %d: %w: %w", len(p), blockdev.ErrCorrupt, err)
	}
	return p, nil
}

func decode(b []byte, chunks uint32) (blockdev.Profile, error) {
	// A row has two bytes at least.
	p := make(blockdev.Profile, 0, min(len(b)/2, blockdev.MaxProfile))
	seen := make(map[uint32]struct{}, cap(p))
	var last blockdev.Touch
	for len(b) > 0 {
		step, n := binary.Varint(b)
		if n <= 0 {
			return p, errors.New("chunk number is not a varint")
		}
		rise, m := binary.Uvarint(b[n:])
		if m <= 0 {
			return p, errors.New("rank is not a varint")
		}
		b = b[n+m:]
		// Bounded first, so that the sum cannot overflow.
		chunk := min(max(step, -math.MaxUint32), math.MaxUint32) + int64(last.Chunk)
		rank := min(rise, math.MaxUint32) + uint64(last.Rank)
		_, again := seen[uint32(chunk)]
		switch {
		case len(p) == blockdev.MaxProfile:
			return p, fmt.Errorf("more than %d chunks", blockdev.MaxProfile)
		case chunk < 0 || chunk >= int64(chunks):
			return p, fmt.Errorf("chunk number %d, the diff has %d", chunk, chunks)
		case again:
			return p, fmt.Errorf("chunk number %d for the second time", chunk)
		case rank > math.MaxUint32:
			return p, errors.New("rank does not fit in 32 bits")
		}
		last = blockdev.Touch{Chunk: uint32(chunk), Rank: uint32(rank)}
		seen[last.Chunk] = struct{}{}
		p = append(p, last)
	}
	return p, nil
}

// Merge makes one profile of the reports of several starts: every chunk that one
// of them has, with the mean of its ranks. A chunk that fewer than half of them
// have comes after all that more have: it may be some configuration's own. Of
// more chunks than a profile may have, the last are left out.
func Merge(reports []blockdev.Profile) blockdev.Profile {
	if len(reports) == 1 {
		return slices.Clone(reports[0])
	}
	type sum struct{ ranks, starts uint64 }
	sums := make(map[uint32]sum)
	for _, r := range reports {
		for _, t := range r {
			s := sums[t.Chunk]
			sums[t.Chunk] = sum{s.ranks + uint64(t.Rank), s.starts + 1}
		}
	}
	var often, seldom blockdev.Profile
	for chunk, s := range sums {
		t := blockdev.Touch{Chunk: chunk, Rank: uint32(s.ranks / s.starts)}
		if 2*s.starts >= uint64(len(reports)) {
			often = append(often, t)
		} else {
			seldom = append(seldom, t)
		}
	}
	order := func(a, b blockdev.Touch) int {
		return cmp.Or(cmp.Compare(a.Rank, b.Rank), cmp.Compare(a.Chunk, b.Chunk))
	}
	slices.SortFunc(often, order)
	slices.SortFunc(seldom, order)
	if len(often) > 0 {
		// Their ranks go on where the others end, also among other diffs' ranks.
		last := often[len(often)-1].Rank
		for i := range seldom {
			seldom[i].Rank = max(seldom[i].Rank, last)
		}
	}
	merged := append(often, seldom...)
	return merged[:min(len(merged), blockdev.MaxProfile)]
}
