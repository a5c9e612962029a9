package cdc

import "github.com/shoalfs/shoal/blockdev"

const (
	// NormalChunk is the length, in bytes, at which the cut condition turns from
	// strict to lax.
	NormalChunk = 64 << 10

	// BigFile is the size, in bytes, from which on a file has chunks of its own.
	BigFile = 16 << 10
)

const (
	// A cut follows a byte whose hash is below the limit: one byte in 2^18 while
	// the chunk is short, one in 2^14 from NormalChunk on.
	strictLimit = 1 << (64 - 18)
	laxLimit    = 1 << (64 - 14)
	// smallLimit is that for the last byte of a small file, after mixing: the top
	// bits of the hash itself are known to be no cut by then.
	smallLimit = 1 << (64 - 3)
	mixer      = 0x9e3779b97f4a7c15 // 2^64 / golden ratio, odd (Knuth, TAOCP 6.4)
)

// Chunker finds the cuts of one stream. The zero value is ready, at the start
// of a stream. It is not safe for use by several goroutines.
type Chunker struct {
	hash   uint64
	length int // bytes of the current chunk seen so far
	big    bool
}

// Next looks at p, the next bytes of the stream, and returns how many of them
// belong to the current chunk, and whether that chunk ends there. If it does
// not, n is len(p). How the stream is divided over calls makes no difference.
// What is left at the end of the stream is the last chunk, of any length.
func (c *Chunker) Next(p []byte) (n int, cut bool) {
	if c.length < blockdev.MinChunk {
		n = min(blockdev.MinChunk-c.length, len(p))
	}
	if n < len(p) && c.length+n < NormalChunk {
		if n, cut = c.scan(p[:min(NormalChunk-c.length, len(p))], n, strictLimit); cut {
			return n, true
		}
	}
	if n < len(p) {
		if n, cut = c.scan(p[:min(blockdev.MaxChunk-c.length, len(p))], n, laxLimit); cut {
			return n, true
		}
	}
	if c.length += n; c.length == blockdev.MaxChunk {
		c.restart()
		return n, true
	}
	return n, false
}

// Begin says that the content of a file, size bytes of it, starts with the next
// byte. If it reports true, the current chunk ends before that byte.
func (c *Chunker) Begin(size int64) (cut bool) {
	c.big = size >= BigFile
	if !c.big || c.length < blockdev.MinChunk {
		return false
	}
	c.restart()
	return true
}

// End says that the content which Begin announced has ended with the last byte.
// If it reports true, the current chunk ends there as well. If the last byte
// ended a chunk anyhow, End reports false.
func (c *Chunker) End() (cut bool) {
	if c.length < blockdev.MinChunk || !c.big && c.hash*mixer >= smallLimit {
		return false
	}
	c.restart()
	return true
}

func (c *Chunker) restart() { c.hash, c.length = 0, 0 }

// scan hashes p from i on. It returns the length up to and with the byte that
// a cut follows, having started the next chunk, or len(p) and false.
func (c *Chunker) scan(p []byte, i int, limit uint64) (int, bool) {
	h := c.hash
	for k, b := range p[i:] {
		h = h<<1 + gear[b]
		if h < limit {
			c.restart()
			return i + k + 1, true
		}
	}
	c.hash = h
	return len(p), false
}
