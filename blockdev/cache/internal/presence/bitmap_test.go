package presence

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
)

func TestBitmapHeader(t *testing.T) {
	h := Header{
		Complete: true, DiffID: blockdev.Sum([]byte("d")), Index: blockdev.Sum([]byte("i")),
		Boot: HashBoot("b"), DiffSize: 12345, Chunks: 7,
	}
	b := h.Encode()
	got, err := DecodeHeader(b)
	if err != nil || got != h {
		t.Fatalf("%+v, %v", got, err)
	}
	// Every bit of what is summed counts.
	for i := range headerSum + 32 {
		b[i] ^= 1 << (i % 8)
		if _, err := DecodeHeader(b); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
		b[i] ^= 1 << (i % 8)
	}
	if _, err := DecodeHeader(b[:HeaderSize-1]); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("short header: %v", err)
	}
}

func TestRecord(t *testing.T) {
	c := newRecordCodec(blockdev.Sum([]byte("d")))
	b := make([]byte, recordSize)
	if r, ok := c.get(b, 3); !ok || r != (record{}) {
		t.Errorf("a record of zeros: %+v, %v", r, ok)
	}
	want := record{0xf0f0, 0x7070, 0x8}
	c.put(b, 3, want)
	if r, ok := c.get(b, 3); !ok || r != want {
		t.Errorf("%+v, %v", r, ok)
	}
	if _, ok := c.get(b, 4); ok {
		t.Error("a record is believed in another's place")
	}
	if _, ok := newRecordCodec(blockdev.Sum([]byte("e"))).get(b, 3); ok {
		t.Error("a record is believed in another diff")
	}
	for i := range recordSize * 8 {
		b[i/8] ^= 1 << (i % 8)
		if _, ok := c.get(b, 3); ok {
			t.Errorf("bit %d flipped, still believed", i)
		}
		b[i/8] ^= 1 << (i % 8)
	}
}

func TestBitset(t *testing.T) {
	const n = 100
	for lo := range n {
		for hi := lo; hi <= n; hi++ {
			b := NewBitset(n)
			for i := lo; i < hi; i++ {
				b.Set(i)
			}
			if !b.All(lo, hi) || (lo > 0 && b.All(lo-1, hi)) || (hi < n && b.All(lo, hi+1)) {
				t.Fatalf("all(%d, %d) is wrong", lo, hi)
			}
			if hi > lo {
				if b.nextSet(0, n) != lo || b.nextClear(lo, n) != hi {
					t.Fatalf("[%d, %d): next set %d, next clear %d", lo, hi, b.nextSet(0, n), b.nextClear(lo, n))
				}
				b.unset(lo)
				if b.Get(lo) || b.All(lo, hi) {
					t.Fatalf("[%d, %d): unset", lo, hi)
				}
			} else if b.nextSet(0, n) != n {
				t.Fatal("an empty set has a bit")
			}
		}
	}
}

func presenceOf(ix *blockdev.Index) *Chunks {
	return New(ix.DiffID, len(ix.Chunks), func(i int) int { return int(ix.Chunks[i].Length) })
}

// FuzzBitmap: no bitmap file crashes the reader, and none makes it believe a
// record whose checksum does not hold.
func FuzzBitmap(f *testing.F) {
	ix, _ := blockdevtest.Diff(1, 5<<20)
	n := len(ix.Chunks)
	h := HeaderOf(ix, blockdev.Sum([]byte("index")), HashBoot("b"))
	good := make([]byte, FileSize(n))
	copy(good, h.Encode())
	codec := newRecordCodec(ix.DiffID)
	for g := range records(n) {
		codec.put(good[HeaderSize+g*recordSize:], g, record{present: 0xffff, synced: 0xff, suspect: 0xf0000})
	}
	f.Add(good, true)
	f.Add(good, false)
	f.Add(good[:HeaderSize], true)
	f.Add([]byte{}, true)
	f.Fuzz(func(t *testing.T, b []byte, sameBoot bool) {
		if got, err := DecodeHeader(b); err == nil {
			if again, err := DecodeHeader(got.Encode()); err != nil || again != got {
				t.Fatalf("%+v, written and read again: %+v, %v", got, again, err)
			}
		}
		if int64(len(b)) != FileSize(n) {
			return
		}
		p := presenceOf(ix)
		believed := BelieveSynced
		if sameBoot {
			believed = BelievePresent
		}
		p.Load(b[HeaderSize:], believed)
		var has int
		for i := range n {
			if p.present.Get(i) {
				has++
				r, ok := codec.get(b[HeaderSize+i/perRecord*recordSize:], i/perRecord)
				if !ok || r.present&(1<<(i%perRecord)) == 0 {
					t.Fatalf("chunk %d is believed without a good record", i)
				}
				if !sameBoot && r.synced&(1<<(i%perRecord)) == 0 {
					t.Fatalf("chunk %d is believed after a boot, but was not synced", i)
				}
			}
			if p.synced.Get(i) && !p.present.Get(i) {
				t.Fatalf("chunk %d is synced and not present", i)
			}
		}
		if got, _, _ := p.Counts(); got != has {
			t.Fatalf("counts %d, has %d", got, has)
		}
		none := presenceOf(ix)
		none.Load(b[HeaderSize:], BelieveNone)
		if got, _, _ := none.Counts(); got != 0 {
			t.Fatalf("%d chunks are believed where nothing is to be", got)
		}
	})
}

// TestFailedSync: what the kernel could not write is missing; what was synced
// before, and what came and went meanwhile, is not touched.
func TestFailedSync(t *testing.T) {
	ix, _ := blockdevtest.Diff(1, 5<<20)
	p := presenceOf(ix)
	p.Add(1)
	p.BeginSync()
	p.EndSync(true)
	p.Add(2)
	p.Add(3)
	if !p.BeginSync() {
		t.Fatal("nothing to sync")
	}
	p.Add(4)  // came meanwhile
	p.Drop(3) // was found damaged meanwhile
	p.Add(3)  // and came again
	p.EndSync(false)
	for i, want := range []bool{false, true, false, true, true} {
		if p.present.Get(i) != want {
			t.Errorf("chunk %d present: %v, want %v", i, !want, want)
		}
	}
	if p.BeginSync() {
		p.Drop(3)
		p.Add(3)
		p.EndSync(true)
	}
	if !p.synced.Get(1) || !p.synced.Get(4) || p.synced.Get(3) || p.IsSuspect(2) {
		t.Error("wrong chunks are called synced")
	}
	_, _, unsynced := p.Counts()
	if want := int64(ix.Chunks[3].Length); unsynced != want {
		t.Errorf("%d bytes unsynced, want %d", unsynced, want)
	}
}

// TestFormatsPage decodes the example of docs/formats.md, so that the page stays
// true.
func TestFormatsPage(t *testing.T) {
	page, err := os.ReadFile("../../../../docs/formats.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)```bitmap-example\n(.*?)```").FindSubmatch(page)
	if m == nil {
		t.Fatal("docs/formats.md has no example of a bitmap")
	}
	file := make([]byte, FileSize(1))
	for line := range strings.Lines(string(m[1])) {
		at, dump, _ := strings.Cut(line, "  ")
		off, err := strconv.ParseInt(at, 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		b, err := hex.DecodeString(strings.Join(strings.Fields(dump), ""))
		if err != nil {
			t.Fatal(err)
		}
		copy(file[off:], b)
	}
	fill := func(c byte) (d blockdev.Digest) {
		copy(d[:], bytes.Repeat([]byte{c}, len(d)))
		return d
	}
	want := Header{Complete: true, DiffID: fill(0xee), Index: fill(0xcc), DiffSize: 5, Chunks: 1}
	copy(want.Boot[:], bytes.Repeat([]byte{0xbb}, 16))
	got, err := DecodeHeader(file[:HeaderSize])
	if err != nil || got != want {
		t.Errorf("the page's header decodes to %+v, %v", got, err)
	}
	rec, ok := newRecordCodec(want.DiffID).get(file[HeaderSize:], 0)
	if !ok || rec != (record{present: 1, synced: 1}) {
		t.Errorf("the page's record decodes to %+v, %v", rec, ok)
	}
	again := want.Encode()
	again = append(again, make([]byte, recordSize)...)
	newRecordCodec(want.DiffID).put(again[HeaderSize:], 0, rec)
	if !bytes.Equal(again, file) {
		t.Errorf("written anew the example is\n%s", hex.Dump(again))
	}
}

// TestMemory: a node has millions of chunks.
func TestMemory(t *testing.T) {
	ix, _ := blockdevtest.Diff(3, 32<<20)
	p := presenceOf(ix)
	sum := 4 * (cap(p.present) + cap(p.synced) + cap(p.suspect) + cap(p.checked) + cap(p.syncing) + cap(p.dirty))
	if per := float64(sum) / float64(len(ix.Chunks)); per > 1 {
		t.Errorf("%.1f bytes a chunk", per)
	}
}
