package cdc

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// file is a range of content in a test stream.
type file struct{ from, to int }

// stream is data with files in it, in order.
type stream struct {
	data  []byte
	files []file
}

// testStream makes size bytes of files of many lengths with zeros in between,
// as a masked diff has them. It is the same for ever for the same seed.
func testStream(seed byte, size int) stream {
	src := rand.NewChaCha8([32]byte{seed})
	rnd := rand.New(src)
	s := stream{data: make([]byte, size)}
	for at := 0; at < size; {
		n := rnd.IntN(8 << 10)
		if rnd.IntN(20) == 0 {
			n = rnd.IntN(1 << 20)
		}
		end := min(at+n, size)
		if _, err := src.Read(s.data[at:end]); err != nil {
			panic(err)
		}
		s.files = append(s.files, file{at, end})
		at = end + 512 + rnd.IntN(1024)
	}
	return s
}

// cuts hands s to a Chunker in steps that step chooses, and returns the lengths
// of the chunks.
func cuts(s stream, step func() int) []int {
	var c Chunker
	var lens []int
	length := 0
	cutHere := func(cut bool) {
		if cut {
			lens, length = append(lens, length), 0
		}
	}
	feed := func(p []byte) {
		for len(p) > 0 {
			n, cut := c.Next(p[:min(step(), len(p))])
			length += n
			cutHere(cut)
			p = p[n:]
		}
	}
	at := 0
	for _, f := range s.files {
		feed(s.data[at:f.from])
		cutHere(c.Begin(int64(f.to - f.from)))
		feed(s.data[f.from:f.to])
		cutHere(c.End())
		at = f.to
	}
	feed(s.data[at:])
	if length > 0 {
		lens = append(lens, length)
	}
	return lens
}

func whole() int { return 1 << 30 }

// The rule is written down once more, a byte at a time, as doc.go says it.
func reference(s stream) []int {
	var lens []int
	var h uint64
	n, fi := 0, 0
	end := func() { lens, h, n = append(lens, n), 0, 0 }
	for i, b := range s.data {
		for fi < len(s.files) && s.files[fi].to <= i {
			fi++
		}
		in := fi < len(s.files) && i >= s.files[fi].from
		big := in && s.files[fi].to-s.files[fi].from >= BigFile
		if big && i == s.files[fi].from && n >= blockdev.MinChunk {
			end()
		}
		n++
		if n > blockdev.MinChunk {
			h = h<<1 + gear[b]
			if n <= NormalChunk && h < 1<<46 || n > NormalChunk && h < 1<<50 || n == blockdev.MaxChunk {
				end()
				continue
			}
		}
		if in && i+1 == s.files[fi].to && n >= blockdev.MinChunk && (big || h*mixer < 1<<61) {
			end()
		}
	}
	if n > 0 {
		end()
	}
	return lens
}

func TestRule(t *testing.T) {
	for seed := range byte(4) {
		s := testStream(seed, 6<<20)
		want := reference(s)
		if got := cuts(s, whole); !slices.Equal(got, want) {
			t.Fatalf("seed %d: lengths %v, by the rule %v", seed, got, want)
		}
		rnd := rand.New(rand.NewPCG(uint64(seed), 1))
		if got := cuts(s, func() int { return 1 + rnd.IntN(5000) }); !slices.Equal(got, want) {
			t.Fatalf("seed %d: small steps cut elsewhere", seed)
		}
		if got := cuts(s, func() int { return 1 }); !slices.Equal(got, want) {
			t.Fatalf("seed %d: steps of one byte cut elsewhere", seed)
		}
	}
}

// The cuts are part of the format. If this test fails, every index that exists
// has been given up; find another way.
func TestGolden(t *testing.T) {
	tab := sha256.New()
	for b, g := range gear {
		sum := sha256.Sum256(append([]byte("shoal gear v1"), byte(b)))
		if want := binary.BigEndian.Uint64(sum[:]); g != want {
			t.Fatalf("gear[%d] = %#x, want %#x", b, g, want)
		}
		if err := binary.Write(tab, binary.BigEndian, g); err != nil {
			t.Fatal(err)
		}
	}
	lens := cuts(testStream(7, 32<<20), whole)
	sum := sha256.Sum256(fmt.Append(nil, lens))
	const want = "514 4901dc7ed0f70012"
	if got := fmt.Sprintf("%d %x", len(lens), sum[:8]); got != want {
		t.Errorf("chunks %s, want %s", got, want)
	}
	if len(lens) < 4 || !slices.Equal(lens[:4], []int{34319, 61102, 69487, 28678}) {
		t.Errorf("first chunks %v", lens[:4])
	}
}

func TestLimits(t *testing.T) {
	s := testStream(1, 16<<20)
	clear(s.data[2<<20 : 6<<20]) // a run of one byte, where the hash stands still
	lens := cuts(s, whole)
	total := 0
	for i, n := range lens {
		if n > blockdev.MaxChunk || n < blockdev.MinChunk && i < len(lens)-1 {
			t.Fatalf("chunk %d has %d bytes", i, n)
		}
		total += n
	}
	if total != len(s.data) {
		t.Fatalf("chunks have %d bytes, stream %d", total, len(s.data))
	}
	if mean := total / len(lens); mean < 32<<10 || mean > 96<<10 {
		t.Errorf("mean %d bytes", mean)
	}
}

// Bytes inserted at one place must leave the cuts elsewhere as they were.
func TestResync(t *testing.T) {
	a := testStream(3, 16<<20)
	const at, more = 5 << 20, 777
	b := stream{data: slices.Concat(a.data[:at], make([]byte, more), a.data[at:])}
	for _, f := range a.files {
		if f.from >= at {
			f.from += more
		}
		if f.to > at {
			f.to += more
		}
		b.files = append(b.files, f)
	}
	seen := map[[32]byte]bool{}
	each := func(s stream, f func([]byte)) {
		p := s.data
		for _, n := range cuts(s, whole) {
			f(p[:n])
			p = p[n:]
		}
	}
	each(a, func(c []byte) { seen[sha256.Sum256(c)] = true })
	fresh := 0
	each(b, func(c []byte) {
		if !seen[sha256.Sum256(c)] {
			fresh += len(c)
		}
	})
	if fresh == 0 || fresh > 4*blockdev.MaxChunk {
		t.Errorf("%d new bytes after an insertion of %d", fresh, more)
	}
}

func FuzzNext(f *testing.F) {
	f.Add(uint8(1), uint32(100_000), uint16(3))
	f.Add(uint8(9), uint32(400_000), uint16(60_000))
	f.Fuzz(func(t *testing.T, seed uint8, size uint32, step uint16) {
		s := testStream(seed, int(size%(1<<20)))
		if got := cuts(s, func() int { return int(step) + 1 }); !slices.Equal(got, reference(s)) {
			t.Fatal("cuts depend on the steps")
		}
	})
}

func BenchmarkNext(b *testing.B) {
	s := testStream(5, 64<<20)
	b.SetBytes(int64(len(s.data)))
	for b.Loop() {
		var c Chunker
		at := 0
		for at < len(s.data) {
			n, _ := c.Next(s.data[at:min(at+256<<10, len(s.data))])
			at += n
		}
	}
}
