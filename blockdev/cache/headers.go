package cache

import (
	"context"
	"fmt"
	"os"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
)

// headers is where a diff's pieces lie in its headers file.
type headers struct {
	pieces []blockdev.Piece
	starts []int64 // len(pieces)+1 of them
}

func newHeaders(ix *blockdev.Index) headers {
	h := headers{pieces: append([]blockdev.Piece(nil), ix.Headers...), starts: make([]int64, len(ix.Headers)+1)}
	for i, p := range h.pieces {
		h.starts[i+1] = h.starts[i] + int64(p.Length)
	}
	return h
}

// chunk is piece i as the Source is asked for it.
func (h *headers) chunk(i int, diffSize int64) blockdev.Chunk {
	return blockdev.Chunk{Offset: diffSize + h.starts[i], Length: h.pieces[i].Length, Digest: h.pieces[i].Digest}
}

// openHeaders opens the headers file. A diff that has no piece yet has no file.
func (d *local) openHeaders(flag int) (*os.File, error) {
	return os.OpenFile(d.path(headersFile), flag, 0o600)
}

// piece reads piece i from f into buf, and says whether it is right.
func (h *headers) piece(f *os.File, i int, buf []byte) ([]byte, bool) {
	b := buf[:h.pieces[i].Length]
	_, err := f.ReadAt(b, h.starts[i])
	return b, err == nil && blockdev.Sum(b) == h.pieces[i].Digest
}

// read reads the piece with this digest, if it is here, into the buffer of at
// least n bytes that alloc returns.
func (h *headers) read(d *local, digest *blockdev.Digest, alloc func(n int) []byte) ([]byte, bool) {
	for i := range h.pieces {
		if h.pieces[i].Digest != *digest || h.pieces[i].Length > blockdev.MaxChunk {
			continue
		}
		f, err := d.openHeaders(os.O_RDONLY)
		if err != nil {
			return nil, false
		}
		defer f.Close()
		return h.piece(f, i, alloc(int(h.pieces[i].Length)))
	}
	return nil, false
}

// fetch sees to it that every piece of the header stream is in f.
func (h *headers) fetch(ctx context.Context, d *local, f *os.File) error {
	buf := d.c.buffer()
	defer d.c.buffers.Put(buf)
	var want []int
	var size int64
	for i := range h.pieces {
		if h.pieces[i].Length == 0 || h.pieces[i].Length > blockdev.MaxChunk {
			return fmt.Errorf("piece %d of the header stream has %d bytes: %w", i, h.pieces[i].Length, blockdev.ErrCorrupt)
		}
		if _, ok := h.piece(f, i, buf[:]); ok {
			continue
		}
		want = append(want, i)
		if size += int64(h.pieces[i].Length); size >= d.c.cfg.RequestBytes {
			if err := h.fetchPieces(ctx, d, f, want); err != nil {
				return err
			}
			want, size = want[:0], 0
		}
	}
	if len(want) == 0 {
		return nil
	}
	return h.fetchPieces(ctx, d, f, want)
}

// fetchPieces asks the Source for some pieces, in one request.
func (h *headers) fetchPieces(ctx context.Context, d *local, f *os.File, want []int) error {
	if _, err := d.c.pace.Gate.Wait(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	size := h.starts[want[len(want)-1]+1] - h.starts[want[0]]
	need := d.c.room.Blocks(h.starts[want[0]], size)
	if err := d.c.room.Take(ctx, &d.share, need, room.ForDemand); err != nil {
		return fmt.Errorf("header stream: %w", err)
	}
	defer func() {
		d.c.room.Wrote(&d.share, need)
		d.c.room.Remeasure(&d.share)
	}()
	chunks := make([]blockdev.Chunk, len(want))
	for k, i := range want {
		chunks[k] = h.chunk(i, d.tab.Size)
	}
	err := d.c.request(ctx, cancel, blockdev.Request{Diff: d.id, Priority: blockdev.Prefetch, Chunks: chunks}, d.c.cfg.Timeout, func(k int, data []byte) error {
		d.c.stats.headers.Add(int64(len(data)))
		if _, err := f.WriteAt(data, h.starts[want[k]]); err != nil {
			return d.c.room.Failed(d.id, fmt.Errorf("write %s: %w", f.Name(), err))
		}
		return nil
	})
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("header stream: %w", err)
	}
	return err
}
