package exchange

import (
	"context"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

// Protocol IDs. An incompatible change gets the next number; servers may offer
// several.
const (
	ChunkProtocol = "/shoal/chunk/1"
	// ImageProtocol and DocumentProtocol keep the words that they had at first: an ID that
	// changes is another protocol.
	ImageProtocol    = "/shoal/index/1"
	DocumentProtocol = "/shoal/manifest/1"
	// ProfileProtocol carries what nodes have learned of starts.
	ProfileProtocol = "/shoal/profile/1"
)

// Encoded is a chunk as it is stored and sent.
type Encoded struct {
	// Data is the chunk, or one zstd frame of it; never longer than
	// blockdev.MaxChunk. It must not change before Release.
	Data []byte
	Zstd bool
	// Length is that of the chunk before compression, 1 to blockdev.MaxChunk
	// bytes.
	Length uint32
	// Release, if not nil, is called once when Data is no longer needed, so
	// that a store can lend its buffers.
	Release func()
}

func (e *Encoded) release() {
	if e.Release != nil {
		e.Release()
	}
	*e = Encoded{}
}

func (e *Encoded) check() error {
	n := len(e.Data)
	if n == 0 || n > blockdev.MaxChunk || e.Length == 0 || e.Length > blockdev.MaxChunk || (!e.Zstd && n != int(e.Length)) {
		return fmt.Errorf("the store has %d bytes (zstd: %v) for a chunk of %d: %w", n, e.Zstd, e.Length, blockdev.ErrCorrupt)
	}
	return nil
}

// Chunks is where a server's chunks come from.
type Chunks interface {
	// Chunk returns the chunk with this digest. Its errors wrap those of
	// blockdev. It is called from many goroutines.
	Chunk(ctx context.Context, d blockdev.Digest) (Encoded, error)
}

// Images is where a server's indexes come from.
type Images interface {
	// FetchIndexesFor is image.Source's FetchIndexes on behalf of a peer,
	// whose ID has been proven. It may take as long as fetching the image
	// takes; ctx ends when the peer is gone.
	FetchIndexesFor(ctx context.Context, peer string, req image.Request) (*image.Image, error)
}

// Documents is where a server's manifests and configs come from.
type Documents interface {
	// DocumentFor is image.DocumentSource's Document on behalf of a peer,
	// whose ID has been proven. ctx ends when the peer is gone.
	DocumentFor(ctx context.Context, peer string, req image.DocumentRequest) (*image.Document, error)
}

// Profiles takes startup profiles that peers report.
type Profiles interface {
	// ReportProfileFrom takes what a start on a peer, whose ID has been proven,
	// has read of one diff. Nothing of it has been checked against the diff, or
	// that this peer may speak of it.
	ReportProfileFrom(ctx context.Context, peer string, p blockdev.DiffProfile) error
}

// decoder decompresses chunks. It is made when first used: a host with raw
// neighbours only never pays for it. It has no goroutines and needs no closing.
type decoder struct {
	once sync.Once
	z    *zstd.Decoder
	err  error
}

// maxZstdWindow bounds what a zstd frame may claim to refer back to. Frames of a
// chunk need no more than the chunk, but streaming encoders write their default.
const maxZstdWindow = 8 << 20

// decode writes the chunk of n bytes that is in src to dst's array, which must
// have that capacity. Any other length is an error; it wraps
// blockdev.ErrCorrupt.
func (d *decoder) decode(dst, src []byte, n int) ([]byte, error) {
	d.once.Do(func() {
		d.z, d.err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true),
			zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
	})
	if d.err != nil {
		return nil, fmt.Errorf("zstd: %w", d.err)
	}
	out, err := d.z.DecodeAll(src, dst[:0:n])
	if err != nil {
		return nil, fmt.Errorf("zstd frame of %d bytes for a chunk of %d: %w: %w", len(src), n, blockdev.ErrCorrupt, err)
	}
	if len(out) != n {
		return nil, fmt.Errorf("zstd frame of %d bytes, the chunk has %d: %w", len(out), n, blockdev.ErrCorrupt)
	}
	return out, nil
}

// Buffers lends buffers of two sizes: for most chunks, and for the largest frame.
// The zero value is ready.
type Buffers struct{ small, large sync.Pool }

const smallBuffer = blockdev.AvgChunk + 8<<10

// Get returns a buffer of at least n bytes, which must not be more than the largest
// message with a chunk has.
func (b *Buffers) Get(n int) *[]byte {
	pool, size := &b.small, smallBuffer
	if n > smallBuffer {
		pool, size = &b.large, wire.MaxChunkFrame
	}
	if p, ok := pool.Get().(*[]byte); ok {
		return p
	}
	p := make([]byte, size)
	return &p
}

// Put takes a buffer of Get back.
func (b *Buffers) Put(p *[]byte) {
	if cap(*p) > smallBuffer {
		b.large.Put(p)
	} else {
		b.small.Put(p)
	}
}
