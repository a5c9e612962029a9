package profile

import (
	"encoding/binary"
	"errors"
	"math"
	"reflect"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

func TestRoundTrip(t *testing.T) {
	full := make(blockdev.Profile, blockdev.MaxProfile)
	for i := range full {
		full[i] = blockdev.Touch{Chunk: math.MaxUint32 - 1 - uint32(i)*3, Rank: uint32(i) * (math.MaxUint32 / blockdev.MaxProfile)}
	}
	for name, p := range map[string]blockdev.Profile{
		"one":          {{Chunk: 0, Rank: 0}},
		"back and on":  {{Chunk: 7, Rank: 1}, {Chunk: 2, Rank: 1}, {Chunk: 3, Rank: 9}},
		"largest":      {{Chunk: math.MaxUint32 - 1, Rank: math.MaxUint32}, {Chunk: 0, Rank: math.MaxUint32}},
		"all there is": full,
	} {
		enc := Append(nil, p)
		got, err := Decode(enc, math.MaxUint32)
		if err != nil || !reflect.DeepEqual(got, p) {
			t.Errorf("%s: %d rows became %d, %v", name, len(p), len(got), err)
		}
	}
	if got, err := Decode(nil, 5); err != nil || len(got) != 0 {
		t.Errorf("empty: %v, %v", got, err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	row := func(step int64, rise uint64) []byte {
		return binary.AppendUvarint(binary.AppendVarint(nil, step), rise)
	}
	rows := func(r ...[]byte) (b []byte) {
		for _, x := range r {
			b = append(b, x...)
		}
		return b
	}
	long := Append(nil, make(blockdev.Profile, 0))
	for range blockdev.MaxProfile + 1 {
		long = append(long, row(1, 0)...)
	}
	for name, b := range map[string][]byte{
		"cut in a chunk number": {0x80},
		"no rank":               {0x02},
		"cut in a rank":         {0x02, 0x80},
		"below zero":            row(-1, 0),
		"behind the diff":       row(10, 0),
		"far behind the diff":   row(math.MaxInt64, 0),
		"far below zero":        rows(row(5, 0), row(math.MinInt64, 0)),
		"twice":                 rows(row(3, 0), row(0, 1)),
		"rank too large":        rows(row(3, math.MaxUint32), row(1, 1)),
		"rank far too large":    rows(row(3, 1), row(1, math.MaxUint64)),
		"too long":              make([]byte, MaxEncoded+1),
	} {
		if p, err := Decode(b, 10); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
	if p, err := Decode(long, math.MaxUint32); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("too many rows: %d rows, %v", len(p), err)
	}
}

func TestMerge(t *testing.T) {
	type p = blockdev.Profile
	for name, c := range map[string]struct {
		reports []blockdev.Profile
		want    blockdev.Profile
	}{
		"none": {nil, nil},
		"one":  {[]p{{{Chunk: 4, Rank: 2}, {Chunk: 1, Rank: 3}}}, p{{Chunk: 4, Rank: 2}, {Chunk: 1, Rank: 3}}},
		"mean rank": {
			[]p{{{Chunk: 1, Rank: 0}, {Chunk: 2, Rank: 10}}, {{Chunk: 2, Rank: 2}, {Chunk: 1, Rank: 20}}},
			p{{Chunk: 2, Rank: 6}, {Chunk: 1, Rank: 10}},
		},
		"union of two": {
			[]p{{{Chunk: 1, Rank: 5}}, {{Chunk: 2, Rank: 4}}},
			p{{Chunk: 2, Rank: 4}, {Chunk: 1, Rank: 5}},
		},
		"what one of three has comes last": {
			[]p{{{Chunk: 9, Rank: 0}, {Chunk: 1, Rank: 8}}, {{Chunk: 1, Rank: 8}}, {{Chunk: 1, Rank: 8}}},
			p{{Chunk: 1, Rank: 8}, {Chunk: 9, Rank: 8}},
		},
	} {
		if got := Merge(c.reports); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	var a, b blockdev.Profile
	for i := range uint32(blockdev.MaxProfile) {
		a = append(a, blockdev.Touch{Chunk: i, Rank: i})
		b = append(b, blockdev.Touch{Chunk: i + blockdev.MaxProfile, Rank: i + 1})
	}
	m := Merge([]blockdev.Profile{a, b})
	if len(m) != blockdev.MaxProfile || m[0].Chunk != 0 {
		t.Errorf("%d rows, the first %v", len(m), m[0])
	}
	if _, err := Decode(Append(nil, m), math.MaxUint32); err != nil {
		t.Errorf("a merged profile is none: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(Append(nil, blockdev.Profile{{Chunk: 7, Rank: 1}, {Chunk: 2, Rank: 1}, {Chunk: 3, Rank: 9}}), uint32(10))
	f.Add([]byte{0x80, 0x80}, uint32(3))
	f.Fuzz(func(t *testing.T, b []byte, chunks uint32) {
		p, err := Decode(b, chunks)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		seen := map[uint32]bool{}
		for i, r := range p {
			if r.Chunk >= chunks || seen[r.Chunk] || (i > 0 && r.Rank < p[i-1].Rank) {
				t.Fatalf("row %d of %v", i, p)
			}
			seen[r.Chunk] = true
		}
		again, err := Decode(Append(nil, p), chunks)
		if err != nil || len(again) != len(p) || len(p) > 0 && !reflect.DeepEqual(again, p) {
			t.Fatalf("%v became %v, %v", p, again, err)
		}
		if m := Merge([]blockdev.Profile{p, p, nil}); len(m) != len(p) {
			t.Fatalf("merged with itself: %d rows of %d", len(m), len(p))
		}
	})
}
