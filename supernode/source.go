package supernode

import (
	"context"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/exchange"
)

// Fetch implements blockdev.Source for the process that the supernode lives in.
// Chunks that it has are delivered even if it lacks others.
func (s *Supernode) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	buf := s.decoder.get()
	defer s.decoder.put(buf)
	var missing error
	for i, want := range req.Chunks {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("fetching chunks of diff %s: %w", req.Diff, err)
		}
		if want.Length == 0 || want.Length > blockdev.MaxChunk {
			return fmt.Errorf("diff %s: chunk %s of %d bytes: %w", req.Diff, want.Digest, want.Length, blockdev.ErrCorrupt)
		}
		data, err := s.raw(ctx, want, (*buf)[:0])
		if err == nil {
			err = deliver(i, data)
			if err != nil {
				return fmt.Errorf("diff %s: chunk %s: %w", req.Diff, want.Digest, err)
			}
			continue
		}
		if ctx.Err() != nil {
			return fmt.Errorf("fetching chunks of diff %s: %w", req.Diff, ctx.Err())
		}
		if missing == nil {
			missing = fmt.Errorf("diff %s: %w", req.Diff, err)
		}
	}
	return missing
}

// Chunk implements exchange.Chunks. Knowing a chunk's digest is the right to
// have it. Errors wrap blockdev.ErrNotFound or blockdev.ErrCorrupt.
func (s *Supernode) Chunk(ctx context.Context, d blockdev.Digest) (exchange.Encoded, error) {
	c, err := s.store.Chunk(ctx, d)
	s.metrics.chunk(err, len(c.Data))
	if err != nil {
		return exchange.Encoded{}, err
	}
	return exchange.Encoded{Data: c.Data, Zstd: c.Zstd, Length: c.Length}, nil
}

// raw reads a chunk, decompressed.
func (s *Supernode) raw(ctx context.Context, want blockdev.Chunk, buf []byte) ([]byte, error) {
	c, err := s.Chunk(ctx, want.Digest)
	if err != nil {
		return nil, err
	}
	data := c.Data
	if c.Zstd {
		if data, err = s.decoder.z.DecodeAll(c.Data, buf); err != nil {
			return nil, fmt.Errorf("chunk %s: %w: %w", want.Digest, blockdev.ErrCorrupt, err)
		}
	}
	if len(data) != int(want.Length) {
		return nil, fmt.Errorf("chunk %s has %d bytes, and %d were requested: %w", want.Digest, len(data), want.Length, blockdev.ErrCorrupt)
	}
	return data, nil
}

// decoder decompresses chunks, several at a time.
type decoder struct {
	z    *zstd.Decoder
	pool sync.Pool // *[]byte of capacity blockdev.MaxChunk
}

func newDecoder() (*decoder, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w", err)
	}
	return &decoder{z: z, pool: sync.Pool{New: func() any {
		b := make([]byte, 0, blockdev.MaxChunk)
		return &b
	}}}, nil
}

func (d *decoder) get() *[]byte { return d.pool.Get().(*[]byte) }

func (d *decoder) put(b *[]byte) { d.pool.Put(b) }

func (d *decoder) close() error {
	d.z.Close()
	return nil
}
