package blockdev

import (
	"fmt"
	"iter"
)

// Limits of the chunker, in bytes. A chunk that is longer than MaxChunk is
// refused wherever it turns up; only the last chunk of a diff, and pieces, may
// be shorter than MinChunk.
const (
	MinChunk = 16 << 10
	AvgChunk = 64 << 10
	MaxChunk = 256 << 10
)

// Chunk is one row of the chunk table.
type Chunk struct {
	Offset int64  // bytes, in the masked diff
	Length uint32 // bytes, 1..MaxChunk
	Digest Digest // SHA-256 of the masked bytes
}

// Check returns nil if data has the chunk's length and digest, or an error that wraps
// ErrCorrupt.
func (c Chunk) Check(data []byte) error {
	if len(data) != int(c.Length) {
		return fmt.Errorf("chunk %s has %d bytes, want %d: %w", c.Digest, len(data), c.Length, ErrCorrupt)
	}
	if Sum(data) != c.Digest {
		return fmt.Errorf("the bytes of chunk %s do not match its digest: %w", c.Digest, ErrCorrupt)
	}
	return nil
}

// Piece is a part of the header stream. It is stored and fetched as a chunk is.
type Piece struct {
	Length uint32 // bytes, 1..MaxChunk
	Digest Digest
}

// Check is Chunk.Check for a piece.
func (p Piece) Check(data []byte) error { return Chunk{Length: p.Length, Digest: p.Digest}.Check(data) }

// Index is all that a node needs to mount a layer before it has any of the
// layer's data. It is a function of the diff and the builder alone.
type Index struct {
	// Builder is the version of the builder that made the index (layer.BuilderVersion).
	// Two builders may give the same diff another Meta or Implied, and nothing else.
	Builder uint32
	// DiffID is the SHA-256 of the diff.
	DiffID Digest
	// DiffSize is the length of the diff, and so of the masked diff, in bytes.
	DiffSize int64
	// Meta is the EROFS metadata image, device 0 of the block image. Its one
	// extra device is the masked diff, in blocks of 512 bytes.
	Meta []byte
	// Chunks cover [0, DiffSize) in order. Empty only for an empty diff.
	Chunks []Chunk
	// Headers, joined, are the zstd-compressed header stream: every byte that
	// the mask zeroed, needed only to prove a complete diff against DiffID.
	Headers []Piece
	// Implied lists the directories that the tar has entries below, but no entry
	// for (clean, slash-separated, no leading slash, sorted). Their attributes
	// are those of the layers below, which a single layer cannot know.
	Implied []string
}

// Digests are those of all chunks and header pieces, in order, repeated where they
// repeat.
func (ix *Index) Digests() iter.Seq[Digest] {
	return func(yield func(Digest) bool) {
		for _, c := range ix.Chunks {
			if !yield(c.Digest) {
				return
			}
		}
		for _, p := range ix.Headers {
			if !yield(p.Digest) {
				return
			}
		}
	}
}
