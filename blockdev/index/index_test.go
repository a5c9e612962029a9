package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shoalfs/shoal/blockdev"
)

// sample is an index with n chunks.
func sample(seed uint64, n, meta int) *blockdev.Index {
	r := rand.New(rand.NewPCG(seed, 1))
	digest := func() (d blockdev.Digest) {
		for i := range d {
			d[i] = byte(r.Uint32())
		}
		return d
	}
	ix := &blockdev.Index{DiffID: digest()}
	if meta > 0 {
		ix.Meta = make([]byte, meta)
		for i := range ix.Meta {
			if i%7 == 0 {
				ix.Meta[i] = byte(r.Uint32())
			}
		}
	}
	for range n {
		c := blockdev.Chunk{Offset: ix.DiffSize, Length: 1 + r.Uint32N(blockdev.MaxChunk), Digest: digest()}
		ix.Chunks = append(ix.Chunks, c)
		ix.DiffSize += int64(c.Length)
	}
	for range n / 50 {
		ix.Headers = append(ix.Headers, blockdev.Piece{Length: 1 + r.Uint32N(blockdev.MaxChunk), Digest: digest()})
	}
	for i := range n % 10 {
		ix.Implied = append(ix.Implied, fmt.Sprintf("usr/%d", i), fmt.Sprintf("usr/%d/x", i))
	}
	return ix
}

func encode(t testing.TB, ix *blockdev.Index) []byte {
	t.Helper()
	b, err := Encode(ix)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	for _, ix := range []*blockdev.Index{
		{},
		{Meta: []byte{1}},
		{Implied: []string{"a"}},
		{Headers: []blockdev.Piece{{Length: blockdev.MaxChunk}}},
		{Builder: 7, DiffSize: 1, Chunks: []blockdev.Chunk{{Length: 1}}},
		sample(1, 1, 1),
		sample(2, 777, 100_000),
		sample(3, 10_009, 3<<20),
		sample(4, 0, 40<<20), // more than the window
		{Meta: bytes.Repeat([]byte("12345678"), 8<<20)},
	} {
		b := encode(t, ix)
		got, err := Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, ix) {
			t.Fatalf("another index comes back (%d chunks)", len(ix.Chunks))
		}
		if !bytes.Equal(encode(t, got), b) {
			t.Fatalf("the same index gives other bytes (%d chunks)", len(ix.Chunks))
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	chunk := func(off int64, n uint32) blockdev.Chunk { return blockdev.Chunk{Offset: off, Length: n} }
	many := make([]string, MaxImplied+1)
	for i := range many {
		many[i] = fmt.Sprintf("%07d", i)
	}
	long := make([]string, 520)
	for i := range long {
		long[i] = fmt.Sprintf("%07d", i) + strings.Repeat("x", 65_000)
	}
	tooMany := make([]blockdev.Chunk, MaxEncoded/digestSize+1)
	for i := range tooMany {
		tooMany[i] = chunk(int64(i), 1)
	}
	for _, c := range []struct {
		what string
		ix   blockdev.Index
		want error
	}{
		{"gap", blockdev.Index{DiffSize: 3, Chunks: []blockdev.Chunk{chunk(0, 1), chunk(2, 1)}}, blockdev.ErrCorrupt},
		{"overlap", blockdev.Index{DiffSize: 3, Chunks: []blockdev.Chunk{chunk(0, 2), chunk(1, 2)}}, blockdev.ErrCorrupt},
		{"starts late", blockdev.Index{DiffSize: 2, Chunks: []blockdev.Chunk{chunk(1, 1)}}, blockdev.ErrCorrupt},
		{"too short", blockdev.Index{DiffSize: 2, Chunks: []blockdev.Chunk{chunk(0, 1)}}, blockdev.ErrCorrupt},
		{"too long", blockdev.Index{DiffSize: 2, Chunks: []blockdev.Chunk{chunk(0, 3)}}, blockdev.ErrCorrupt},
		{"no chunks", blockdev.Index{DiffSize: 2}, blockdev.ErrCorrupt},
		{"empty chunk", blockdev.Index{DiffSize: 1, Chunks: []blockdev.Chunk{chunk(0, 0), chunk(0, 1)}}, blockdev.ErrCorrupt},
		{"large chunk", blockdev.Index{DiffSize: blockdev.MaxChunk + 1, Chunks: []blockdev.Chunk{chunk(0, blockdev.MaxChunk+1)}}, blockdev.ErrCorrupt},
		{"empty piece", blockdev.Index{Headers: []blockdev.Piece{{}}}, blockdev.ErrCorrupt},
		{"large piece", blockdev.Index{Headers: []blockdev.Piece{{Length: blockdev.MaxChunk + 1}}}, blockdev.ErrCorrupt},
		{"negative", blockdev.Index{DiffSize: -1}, blockdev.ErrCorrupt},
		{"empty path", blockdev.Index{Implied: []string{""}}, blockdev.ErrCorrupt},
		{"dot", blockdev.Index{Implied: []string{"."}}, blockdev.ErrCorrupt},
		{"dot dot", blockdev.Index{Implied: []string{"a/../b"}}, blockdev.ErrCorrupt},
		{"absolute", blockdev.Index{Implied: []string{"/a"}}, blockdev.ErrCorrupt},
		{"trailing slash", blockdev.Index{Implied: []string{"a/"}}, blockdev.ErrCorrupt},
		{"double slash", blockdev.Index{Implied: []string{"a//b"}}, blockdev.ErrCorrupt},
		{"NUL", blockdev.Index{Implied: []string{"a\x00"}}, blockdev.ErrCorrupt},
		{"unsorted", blockdev.Index{Implied: []string{"b", "a"}}, blockdev.ErrCorrupt},
		{"twice", blockdev.Index{Implied: []string{"a", "a"}}, blockdev.ErrCorrupt},
		{"long path", blockdev.Index{Implied: []string{strings.Repeat("x", math.MaxUint16+1)}}, blockdev.ErrCorrupt},
		{"many paths", blockdev.Index{Implied: many}, blockdev.ErrUnsupported},
		{"long paths", blockdev.Index{Implied: long}, blockdev.ErrUnsupported},
		{"large metadata", blockdev.Index{Meta: make([]byte, MaxMeta+1)}, blockdev.ErrUnsupported},
		{"many chunks", blockdev.Index{DiffSize: int64(len(tooMany)), Chunks: tooMany}, blockdev.ErrUnsupported},
	} {
		if _, err := Encode(&c.ix); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.what, err, c.want)
		}
	}
}

// forge makes an encoded index of any fields and a right checksum.
func forge(h header, frame, body, digests []byte) []byte {
	b := make([]byte, headerSize)
	copy(b, magic)
	le := binary.LittleEndian
	le.PutUint16(b[offVersion:], version)
	le.PutUint32(b[offChunks:], uint32(h.chunks))
	le.PutUint32(b[offPieces:], uint32(h.pieces))
	le.PutUint32(b[offImplied:], uint32(h.implied))
	le.PutUint32(b[offImpliedSize:], uint32(h.impliedSize))
	le.PutUint32(b[offMetaSize:], uint32(h.metaSize))
	le.PutUint64(b[offDiffSize:], uint64(h.diffSize))
	le.PutUint32(b[offFrameSize:], uint32(len(frame)))
	b = append(append(b, frame...), digests...)
	sum := checksum(b, body, len(frame))
	copy(b[offChecksum:], sum[:])
	return b
}

func TestDecodeRefuses(t *testing.T) {
	pack := func(body []byte) []byte {
		b, err := compress(nil, body)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	zeros := make([]byte, 1<<20)
	withCRC, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(true))
	if err != nil {
		t.Fatal(err)
	}
	defer withCRC.Close()
	wide, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(false), zstd.WithWindowSize(2*window))
	if err != nil {
		t.Fatal(err)
	}
	defer wide.Close()
	large := make([]byte, 3*window)
	skippable := []byte{0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0}
	// One block that says it repeats a byte 100 times, in a frame of 256 MiB.
	claim, err := (&zstd.Header{HasFCS: true, FrameContentSize: MaxMeta, WindowSize: window}).AppendTo(nil)
	if err != nil {
		t.Fatal(err)
	}
	claim = append(claim, 100<<3&0xff|1<<1|1, 100>>5, 0, 'x')
	one := header{chunks: 1, diffSize: 1}
	for _, c := range []struct {
		what string
		b    []byte
		want error
		text string
	}{
		{"nothing", nil, blockdev.ErrCorrupt, "not an index"},
		{"HTML", []byte("<html>not found</html>"), blockdev.ErrCorrupt, "not an index"},
		{"magic alone", []byte(magic), blockdev.ErrCorrupt, "not an index"},
		{"version 2", []byte(magic + "\x02\x00"), blockdev.ErrUnsupported, "version 2"},
		{"no header", []byte(magic + "\x01\x00"), blockdev.ErrCorrupt, "than a header"},
		{"bomb", forge(header{metaSize: 100}, pack(zeros), zeros[:100], nil), blockdev.ErrCorrupt, "not a plain zstd frame of 100 bytes"},
		{"claim", forge(header{metaSize: MaxMeta}, claim, nil, nil), blockdev.ErrCorrupt, "can hold 100"},
		{"too little", forge(header{metaSize: 2 << 20}, pack(zeros), zeros, nil), blockdev.ErrCorrupt, "not a plain"},
		{"two frames", forge(header{metaSize: 1 << 20}, append(pack(zeros[:1<<19]), pack(zeros[:1<<19])...), zeros, nil), blockdev.ErrCorrupt, "not a plain"},
		{"frame and rest", forge(header{metaSize: 1 << 20}, append(pack(zeros), skippable...), zeros, nil), blockdev.ErrCorrupt, "8 bytes after the compressed"},
		{"skippable first", forge(header{metaSize: 1 << 20}, append(skippable[:8:8], pack(zeros)...), zeros, nil), blockdev.ErrCorrupt, "not a plain"},
		{"cut frame", forge(header{metaSize: 1 << 20}, pack(zeros)[:10], zeros, nil), blockdev.ErrCorrupt, "ends early"},
		{"frame with a checksum", forge(header{metaSize: 1 << 20}, withCRC.EncodeAll(zeros, nil), zeros, nil), blockdev.ErrCorrupt, "not a plain"},
		{"large window", forge(header{metaSize: len(large)}, wide.EncodeAll(large, nil), large, nil), blockdev.ErrCorrupt, "window"},
		{"frame for nothing", forge(header{}, pack(zeros), nil, nil), blockdev.ErrCorrupt, "for nothing"},
		{"no frame", forge(header{metaSize: 1}, nil, nil, nil), blockdev.ErrCorrupt, "compressed metadata"},
		{"not zstd", forge(header{metaSize: 1}, []byte("hello, world"), nil, nil), blockdev.ErrCorrupt, "compressed metadata"},
		{"trailing byte", append(forge(header{}, nil, nil, nil), 0), blockdev.ErrCorrupt, "announces 112"},
		{"missing digest", forge(one, pack(zeros[:3]), zeros[:3], zeros[:31]), blockdev.ErrCorrupt, "announces"},
		{"chunks", forge(header{chunks: math.MaxUint32}, nil, nil, nil), blockdev.ErrCorrupt, "4294967295 chunks"},
		{"pieces", forge(header{pieces: math.MaxUint32}, nil, nil, nil), blockdev.ErrCorrupt, "4294967295 header pieces"},
		{"meta", forge(header{metaSize: MaxMeta + 1}, nil, nil, nil), blockdev.ErrCorrupt, "bytes of metadata"},
		{"implied", forge(header{implied: MaxImplied + 1}, nil, nil, nil), blockdev.ErrCorrupt, "implied"},
		{"diff", forge(header{diffSize: -1}, nil, nil, nil), blockdev.ErrCorrupt, "bytes of diff"},
		{"coverage", forge(header{chunks: 1, diffSize: 2}, pack(zeros[:3]), zeros[:3], zeros[:32]), blockdev.ErrCorrupt, "cover 1 bytes"},
		{"large chunk", forge(header{chunks: 1, diffSize: 1 << 24}, pack([]byte{255, 255, 255}), []byte{255, 255, 255}, zeros[:32]), blockdev.ErrCorrupt, "chunk 0 has"},
		{"implied early end", forge(header{implied: 1, impliedSize: 2}, pack([]byte{3, 0}), []byte{3, 0}, nil), blockdev.ErrCorrupt, "3 bytes where 0"},
		{"implied without room", forge(header{implied: 9, impliedSize: 3}, pack([]byte("\x01\x00a")), []byte("\x01\x00a"), nil), blockdev.ErrCorrupt, "9 implied"},
		{"implied fewer", forge(header{implied: 2, impliedSize: 5}, pack([]byte("\x03\x00abc")), []byte("\x03\x00abc"), nil), blockdev.ErrCorrupt, "end early"},
		{"implied rest", forge(header{implied: 1, impliedSize: 6}, pack([]byte("\x01\x00abcd")), []byte("\x01\x00abcd"), nil), blockdev.ErrCorrupt, "3 bytes after"},
		{"implied path", forge(header{implied: 1, impliedSize: 4}, pack([]byte("\x02\x00..")), []byte("\x02\x00.."), nil), blockdev.ErrCorrupt, "clean"},
	} {
		_, err := Decode(c.b)
		if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.text) {
			t.Errorf("%s: %v; want %v and %q", c.what, err, c.want, c.text)
		}
	}
	if b := forge(header{}, nil, nil, nil); !decodes(b) {
		t.Error("the forger makes nothing that is accepted")
	}
	flags := forge(header{}, nil, nil, nil)
	flags[offFlags] = 1
	if _, err := Decode(flags); !errors.Is(err, blockdev.ErrUnsupported) {
		t.Errorf("unknown flag: %v", err)
	}
}

func decodes(b []byte) bool {
	_, err := Decode(b)
	return err == nil
}

// TestEveryBit: no flipped bit and no cut goes unnoticed. Only inside the
// compressed part may there be bits that mean nothing.
func TestEveryBit(t *testing.T) {
	ix := sample(5, 13, 300)
	b := encode(t, ix)
	h, err := decodeHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		for bit := range 8 {
			b[i] ^= 1 << bit
			if got, err := Decode(b); err == nil {
				if i < headerSize || i >= headerSize+h.frameSize || !reflect.DeepEqual(got, ix) {
					t.Fatalf("bit %d of byte %d can be flipped", bit, i)
				}
			} else if !errors.Is(err, blockdev.ErrCorrupt) && !errors.Is(err, blockdev.ErrUnsupported) {
				t.Fatalf("byte %d: %v has no known cause", i, err)
			}
			b[i] ^= 1 << bit
		}
		if decodes(b[:i]) {
			t.Fatalf("the first %d bytes are accepted", i)
		}
	}
	if !decodes(b) {
		t.Fatal("the whole is refused")
	}
}

// TestUnchanged pins format and contents of version 1: what a checksum covers
// does not depend on the compressor.
func TestUnchanged(t *testing.T) {
	const want = "c016fd0541bc6462b8c554eec91aaf7297e41e67ed264d78463e5ad7e780a41a"
	b := encode(t, sample(6, 1234, 100_000))
	if got := fmt.Sprintf("%x", b[offChecksum:headerSize]); got != want {
		t.Errorf("the checksum is %s, was %s", got, want)
	}
}

// TestOtherCompressor: the same content, compressed otherwise, is the same index.
func TestOtherCompressor(t *testing.T) {
	ix := sample(7, 100, 100_000)
	b := encode(t, ix)
	h, err := decodeHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	body := h.appendBody(nil, ix)
	other := forge(*h, enc.EncodeAll(body, nil), body, b[headerSize+h.frameSize:])
	copy(other[offDiffID:], ix.DiffID[:])
	sum := checksum(other, body, len(other)-headerSize-h.digestsSize())
	copy(other[offChecksum:], sum[:])
	if sum != [sha256.Size]byte(b[offChecksum:headerSize]) {
		t.Error("the checksum depends on the compressor")
	}
	got, err := Decode(other)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, ix) {
		t.Error("another index comes back")
	}
}

func BenchmarkEncode(b *testing.B) {
	ix := sample(10, 33_000, 8<<20)
	b.SetBytes(int64(len(ix.Meta)))
	b.ReportAllocs()
	for b.Loop() {
		encode(b, ix)
	}
}

func BenchmarkDecode(b *testing.B) {
	ix := sample(10, 33_000, 8<<20)
	data := encode(b, ix)
	b.SetBytes(int64(len(ix.Meta)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Decode(data); err != nil {
			b.Fatal(err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{})
	for _, ix := range []*blockdev.Index{{}, sample(8, 1, 10), sample(9, 60, 2000), {Implied: []string{"a", "b/c"}}} {
		f.Add(encode(f, ix))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ix, err := Decode(b)
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) && !errors.Is(err, blockdev.ErrUnsupported) {
				t.Fatalf("no known cause: %v", err)
			}
			return
		}
		again, err := Encode(ix)
		if err != nil {
			t.Fatalf("Encode refuses what Decode accepts: %v", err)
		}
		h, err := decodeHeader(b)
		if err != nil {
			t.Fatal(err)
		}
		h2, err := decodeHeader(again)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again[:offFrameSize], b[:offFrameSize]) || !bytes.Equal(again[offBuilder:headerSize], b[offBuilder:headerSize]) ||
			!bytes.Equal(again[headerSize+h2.frameSize:], b[headerSize+h.frameSize:]) {
			t.Fatal("more than the compressed part has changed")
		}
		if ix2, err := Decode(again); err != nil || !reflect.DeepEqual(ix, ix2) {
			t.Fatalf("another index comes back (%v)", err)
		}
	})
}

// FuzzForged gets past the checksum: the parsers behind it must hold by themselves.
func FuzzForged(f *testing.F) {
	f.Add(1, 0, 0, 0, 0, int64(1), []byte{0, 0, 0}, make([]byte, 32))
	f.Add(0, 1, 2, 6, 1, int64(0), []byte("m\x05\x00\x00\x01\x00a\x01\x00b"), make([]byte, 32))
	f.Fuzz(func(t *testing.T, chunks, pieces, implied, impliedSize, metaSize int, diffSize int64, body, digests []byte) {
		frame, err := compress(nil, body)
		if err != nil {
			t.Fatal(err)
		}
		h := header{chunks: chunks, pieces: pieces, implied: implied, impliedSize: impliedSize, metaSize: metaSize, diffSize: diffSize}
		ix, err := Decode(forge(h, frame, body, digests))
		if err != nil {
			if !errors.Is(err, blockdev.ErrCorrupt) && !errors.Is(err, blockdev.ErrUnsupported) {
				t.Fatalf("no known cause: %v", err)
			}
			return
		}
		b, err := Encode(ix)
		if err != nil {
			t.Fatalf("Encode refuses what Decode accepts: %v", err)
		}
		if ix2, err := Decode(b); err != nil || !reflect.DeepEqual(ix, ix2) {
			t.Fatalf("another index comes back (%v)", err)
		}
	})
}
