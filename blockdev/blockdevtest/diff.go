package blockdevtest

import (
	"encoding/binary"
	"math/rand/v2"

	"github.com/shoalfs/shoal/blockdev"
)

// Bytes returns n bytes that are a function of seed and do not compress.
func Bytes(seed uint64, n int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, n)
	// Read of a ChaCha8 always fills b and never fails.
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

// Diff returns size bytes of random content that stand for a masked diff, and
// an index of them: chunks of random lengths within blockdev's limits, some
// bytes in place of an EROFS image as Meta, and a DiffID that no tar has. All of
// it is a function of seed and size.
func Diff(seed uint64, size int) (*blockdev.Index, []byte) {
	data := Bytes(seed, size)
	ix := &blockdev.Index{
		DiffID:   blockdev.Sum(binary.LittleEndian.AppendUint64([]byte("blockdevtest diff "), seed)),
		DiffSize: int64(size),
		Meta:     Bytes(seed+1, 4096+int(seed%4096)),
	}
	ix.Chunks = Cut(seed, data)
	return ix, data
}

// Cut cuts data into chunks of random lengths between blockdev.MinChunk and
// twice blockdev.AvgChunk; the last may be shorter.
func Cut(seed uint64, data []byte) []blockdev.Chunk {
	rng := rand.New(rand.NewPCG(seed, 1))
	var chunks []blockdev.Chunk
	for off := 0; off < len(data); {
		n := min(blockdev.MinChunk+rng.IntN(2*blockdev.AvgChunk-blockdev.MinChunk+1), len(data)-off)
		chunks = append(chunks, blockdev.Chunk{
			Offset: int64(off),
			Length: uint32(n),
			Digest: blockdev.Sum(data[off : off+n]),
		})
		off += n
	}
	return chunks
}
