package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"math"
	"strings"

	"github.com/shoalfs/shoal/blockdev"
)

// Limits. Encode and Decode both hold them.
const (
	// MaxEncoded is the largest encoded index, in bytes. With 34 bytes a chunk it
	// reaches to diffs of about 250 GB.
	MaxEncoded = 128 << 20
	// MaxMeta is the largest EROFS metadata image, in bytes.
	MaxMeta = 256 << 20
	// MaxDiffSize is the largest diff, in bytes: what 32-bit addresses of
	// 512-byte blocks reach.
	MaxDiffSize = math.MaxUint32 * 512
	// MaxImplied is how many implied directories there may be, and MaxImpliedSize
	// how many bytes their paths may have in all, two a path included.
	MaxImplied     = 1 << 20
	MaxImpliedSize = 32 << 20
)

// The header. All integers are little endian.
const (
	magic   = "shoalidx"
	version = 1

	offVersion     = 8
	offFlags       = 10
	offChunks      = 12
	offPieces      = 16
	offImplied     = 20
	offImpliedSize = 24
	offMetaSize    = 28
	offDiffSize    = 32
	offFrameSize   = 40
	offBuilder     = 44
	offDiffID      = 48
	offChecksum    = 80
	headerSize     = 112

	digestSize = len(blockdev.Digest{})
)

// header is the decoded fixed part.
type header struct {
	chunks, pieces, implied int
	impliedSize, metaSize   int
	frameSize               int
	diffSize                int64
	builder                 uint32
}

// bodySize is the length of the body before compression, in bytes.
func (h *header) bodySize() int {
	return h.metaSize + 3*(h.chunks+h.pieces) + h.impliedSize
}

// digestsSize is the length of the digests, which follow the frame.
func (h *header) digestsSize() int { return digestSize * (h.chunks + h.pieces) }

// check holds the limits; the values are not negative. Sums cannot overflow: no
// count is above MaxEncoded.
func (h *header) check() error {
	for _, l := range []struct {
		what       string
		value, max int64
	}{
		{"chunks", int64(h.chunks), MaxEncoded / int64(digestSize)},
		{"header pieces", int64(h.pieces), MaxEncoded / int64(digestSize)},
		{"digests", int64(h.chunks) + int64(h.pieces), MaxEncoded / int64(digestSize)},
		{"implied directories", int64(h.implied), MaxImplied},
		{"bytes of implied directories", int64(h.impliedSize), MaxImpliedSize},
		{"bytes of metadata", int64(h.metaSize), MaxMeta},
		{"bytes of diff", h.diffSize, MaxDiffSize},
		{"bytes of compressed metadata", int64(h.frameSize), MaxEncoded},
		{"bytes in all", int64(headerSize) + int64(h.frameSize) + int64(h.digestsSize()), MaxEncoded},
	} {
		if l.value < 0 || l.value > l.max {
			return fmt.Errorf("%d %s, at most %d are allowed", l.value, l.what, l.max)
		}
	}
	return nil
}

// Encode returns the encoded form of ix. Errors wrap blockdev.ErrUnsupported if
// ix is larger than the limits, blockdev.ErrCorrupt if it is not a valid index:
// chunks that do not cover [0, DiffSize) in order or have no length within
// 1..MaxChunk, pieces of other lengths than that, implied directories that are
// not clean, relative and sorted.
func Encode(ix *blockdev.Index) ([]byte, error) {
	if err := check(ix); err != nil {
		return nil, fmt.Errorf("encode index: %w: %w", blockdev.ErrCorrupt, err)
	}
	h := header{
		chunks:   len(ix.Chunks),
		pieces:   len(ix.Headers),
		implied:  len(ix.Implied),
		metaSize: len(ix.Meta),
		diffSize: ix.DiffSize,
		builder:  ix.Builder,
	}
	for _, p := range ix.Implied {
		h.impliedSize += 2 + len(p)
	}
	if err := h.check(); err != nil {
		return nil, fmt.Errorf("encode index: %w: %w", blockdev.ErrUnsupported, err)
	}
	body := h.appendBody(make([]byte, 0, h.bodySize()), ix)
	out := make([]byte, headerSize, headerSize+len(body)/4+h.digestsSize())
	out, err := compress(out, body)
	if err != nil {
		return nil, fmt.Errorf("encode index: %w", err)
	}
	h.frameSize = len(out) - headerSize
	if err := h.check(); err != nil {
		return nil, fmt.Errorf("encode index: %w: %w", blockdev.ErrUnsupported, err)
	}
	for i := range ix.Chunks {
		out = append(out, ix.Chunks[i].Digest[:]...)
	}
	for i := range ix.Headers {
		out = append(out, ix.Headers[i].Digest[:]...)
	}
	le := binary.LittleEndian
	copy(out, magic)
	le.PutUint16(out[offVersion:], version)
	le.PutUint32(out[offChunks:], uint32(h.chunks))
	le.PutUint32(out[offPieces:], uint32(h.pieces))
	le.PutUint32(out[offImplied:], uint32(h.implied))
	le.PutUint32(out[offImpliedSize:], uint32(h.impliedSize))
	le.PutUint32(out[offMetaSize:], uint32(h.metaSize))
	le.PutUint64(out[offDiffSize:], uint64(h.diffSize))
	le.PutUint32(out[offFrameSize:], uint32(h.frameSize))
	le.PutUint32(out[offBuilder:], h.builder)
	copy(out[offDiffID:], ix.DiffID[:])
	sum := checksum(out, body, h.frameSize)
	copy(out[offChecksum:], sum[:])
	return out, nil
}

// Info is what the header of an encoded index says.
type Info struct {
	DiffID blockdev.Digest
	Chunks int
	// Tree is how many bytes the metadata and the implied directories have, Memory about
	// how many Decode needs for everything.
	Tree, Memory int64
}

// Memory that Decode needs for an element, besides the bytes of the body: a Chunk, a
// Piece, the header of a string.
const (
	chunkMemory   = 48
	pieceMemory   = 36
	impliedMemory = 16
)

// Peek reads the header alone, and allocates nothing for what it announces. What it
// returns has not been compared with the checksum. Errors are those of Decode.
func Peek(encoded []byte) (Info, error) {
	h, err := decodeHeader(encoded)
	if err != nil {
		return Info{}, fmt.Errorf("decode index: %w", err)
	}
	return Info{
		DiffID: blockdev.Digest(encoded[offDiffID:]),
		Chunks: h.chunks,
		Tree:   int64(h.metaSize) + int64(h.impliedSize),
		// Paths are in the body, and in strings of their own.
		Memory: int64(h.bodySize()) + int64(h.impliedSize) +
			int64(h.chunks)*chunkMemory + int64(h.pieces)*pieceMemory + int64(h.implied)*impliedMemory,
	}, nil
}

// Decode reads an encoded index. Errors wrap blockdev.ErrUnsupported for another
// version of the format or unknown flags, blockdev.ErrCorrupt for anything else.
// The index does not refer to b.
func Decode(b []byte) (*blockdev.Index, error) {
	ix, err := decode(b)
	if err != nil {
		return nil, fmt.Errorf("decode index: %w", err)
	}
	return ix, nil
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{blockdev.ErrCorrupt}, args...)...)
}

func decode(b []byte) (*blockdev.Index, error) {
	h, err := decodeHeader(b)
	if err != nil {
		return nil, err
	}
	frame := b[headerSize : headerSize+h.frameSize]
	digests := b[headerSize+h.frameSize:]
	body, err := decompress(frame, h.bodySize())
	if err != nil {
		return nil, err
	}
	if sum := checksum(b, body, h.frameSize); !bytes.Equal(sum[:], b[offChecksum:headerSize]) {
		return nil, corrupt("checksum does not match")
	}
	ix := &blockdev.Index{Builder: h.builder, DiffID: blockdev.Digest(b[offDiffID:]), DiffSize: h.diffSize}
	if h.metaSize > 0 {
		ix.Meta, body = body[:h.metaSize:h.metaSize], body[h.metaSize:]
	}
	if h.chunks > 0 {
		ix.Chunks = make([]blockdev.Chunk, h.chunks)
		var offset int64
		for i := range ix.Chunks {
			n := lengthAt(body, h.chunks, i)
			ix.Chunks[i] = blockdev.Chunk{Offset: offset, Length: n, Digest: blockdev.Digest(digests[i*digestSize:])}
			offset += int64(n)
		}
		body, digests = body[3*h.chunks:], digests[h.chunks*digestSize:]
	}
	if h.pieces > 0 {
		ix.Headers = make([]blockdev.Piece, h.pieces)
		for i := range ix.Headers {
			ix.Headers[i] = blockdev.Piece{Length: lengthAt(body, h.pieces, i), Digest: blockdev.Digest(digests[i*digestSize:])}
		}
		body = body[3*h.pieces:]
	}
	if ix.Implied, err = decodeImplied(body, h.implied); err != nil {
		return nil, err
	}
	if err := check(ix); err != nil {
		return nil, fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	return ix, nil
}

// decodeHeader reads the fixed part and compares it with the length of b.
func decodeHeader(b []byte) (*header, error) {
	if len(b) < offFlags || string(b[:len(magic)]) != magic {
		return nil, corrupt("not an index: it does not start with %q", magic)
	}
	le := binary.LittleEndian
	if v := le.Uint16(b[offVersion:]); v != version {
		return nil, fmt.Errorf("%w: index of version %d, this build reads version %d", blockdev.ErrUnsupported, v, version)
	}
	if len(b) < headerSize {
		return nil, corrupt("%d bytes are less than a header", len(b))
	}
	if f := le.Uint16(b[offFlags:]); f != 0 {
		return nil, fmt.Errorf("%w: index with unknown flags %#x", blockdev.ErrUnsupported, f)
	}
	size := le.Uint64(b[offDiffSize:])
	if size > MaxDiffSize {
		return nil, corrupt("%d bytes of diff, at most %d are allowed", size, int64(MaxDiffSize))
	}
	h := &header{
		chunks:      int(le.Uint32(b[offChunks:])),
		pieces:      int(le.Uint32(b[offPieces:])),
		implied:     int(le.Uint32(b[offImplied:])),
		impliedSize: int(le.Uint32(b[offImpliedSize:])),
		metaSize:    int(le.Uint32(b[offMetaSize:])),
		frameSize:   int(le.Uint32(b[offFrameSize:])),
		diffSize:    int64(size),
		builder:     le.Uint32(b[offBuilder:]),
	}
	if err := h.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", blockdev.ErrCorrupt, err)
	}
	if want := headerSize + h.frameSize + h.digestsSize(); len(b) != want {
		return nil, corrupt("%d bytes where the header announces %d", len(b), want)
	}
	return h, nil
}

// checksum covers everything but how the body was compressed: the header without
// the frame's length and the checksum, the body, the digests.
func checksum(b, body []byte, frameSize int) [sha256.Size]byte {
	h := sha256.New()
	write(h, b[:offFrameSize])
	write(h, b[offBuilder:offChecksum])
	write(h, body)
	write(h, b[headerSize+frameSize:])
	return [sha256.Size]byte(h.Sum(nil))
}

// write cannot fail: hash.Hash says so.
func write(h hash.Hash, b []byte) { _, _ = h.Write(b) }

// check says what is wrong with an index that is within the limits.
func check(ix *blockdev.Index) error {
	var offset int64
	for i := range ix.Chunks {
		c := &ix.Chunks[i]
		if c.Length == 0 || c.Length > blockdev.MaxChunk {
			return fmt.Errorf("chunk %d has %d bytes, not 1 to %d", i, c.Length, blockdev.MaxChunk)
		}
		if c.Offset != offset {
			return fmt.Errorf("chunk %d starts at %d, the one before it ends at %d", i, c.Offset, offset)
		}
		offset += int64(c.Length)
	}
	if offset != ix.DiffSize {
		return fmt.Errorf("chunks cover %d bytes of a diff of %d", offset, ix.DiffSize)
	}
	for i, p := range ix.Headers {
		if p.Length == 0 || p.Length > blockdev.MaxChunk {
			return fmt.Errorf("header piece %d has %d bytes, not 1 to %d", i, p.Length, blockdev.MaxChunk)
		}
	}
	for i, p := range ix.Implied {
		if err := checkPath(p); err != nil {
			return err
		}
		if i > 0 && p <= ix.Implied[i-1] {
			return fmt.Errorf("implied directory %.100q is not in order, or occurs twice", p)
		}
	}
	return nil
}

// checkPath wants a clean relative path: no empty, "." or ".." element, no NUL.
func checkPath(p string) error {
	if len(p) > math.MaxUint16 {
		return fmt.Errorf("implied directory %.100q... has a path of %d bytes", p, len(p))
	}
	for e := range strings.SplitSeq(p, "/") {
		if e == "" || e == "." || e == ".." || strings.IndexByte(e, 0) >= 0 {
			return fmt.Errorf("implied directory %.100q is not a clean relative path", p)
		}
	}
	return nil
}
