package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
)

// headersFile holds the pieces of the header stream, one behind the other, as far
// as they have been fetched. Which are there is written nowhere: a piece counts
// only if it has its digest when it is read.
const headersFile = "headers"

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

func (d *Diff) headersPath() string { return filepath.Join(d.dir, headersFile) }

// openHeaders opens the headers file. A diff that has no piece yet has no file.
func (d *Diff) openHeaders(flag int) (*os.File, error) {
	return os.OpenFile(d.headersPath(), flag, 0o600)
}

// piece reads piece i from f into buf, and says whether it is right.
func (h *headers) piece(f *os.File, i int, buf []byte) ([]byte, bool) {
	b := buf[:h.pieces[i].Length]
	_, err := f.ReadAt(b, h.starts[i])
	return b, err == nil && blockdev.Sum(b) == h.pieces[i].Digest
}

// readPiece reads the piece with this digest, if it is here, into the buffer of at
// least n bytes that alloc returns.
func (d *Diff) readPiece(digest *blockdev.Digest, alloc func(n int) []byte) ([]byte, bool) {
	for i := range d.heads.pieces {
		if d.heads.pieces[i].Digest != *digest || d.heads.pieces[i].Length > blockdev.MaxChunk {
			continue
		}
		f, err := d.openHeaders(os.O_RDONLY)
		if err != nil {
			return nil, false
		}
		defer f.Close()
		return d.heads.piece(f, i, alloc(int(d.heads.pieces[i].Length)))
	}
	return nil, false
}

// fetchHeaders sees to it that every piece of the header stream is in f.
func (d *Diff) fetchHeaders(ctx context.Context, f *os.File) error {
	buf := d.c.buffer()
	defer d.c.buffers.Put(buf)
	var want []int
	var size int64
	for i := range d.heads.pieces {
		if d.heads.pieces[i].Length == 0 || d.heads.pieces[i].Length > blockdev.MaxChunk {
			return fmt.Errorf("piece %d of the header stream has %d bytes: %w", i, d.heads.pieces[i].Length, blockdev.ErrCorrupt)
		}
		if _, ok := d.heads.piece(f, i, buf[:]); ok {
			continue
		}
		want = append(want, i)
		if size += int64(d.heads.pieces[i].Length); size >= d.c.cfg.RequestBytes {
			if err := d.fetchPieces(ctx, f, want); err != nil {
				return err
			}
			want, size = want[:0], 0
		}
	}
	if len(want) == 0 {
		return nil
	}
	return d.fetchPieces(ctx, f, want)
}

// fetchPieces asks the Source for some pieces, in one request.
func (d *Diff) fetchPieces(ctx context.Context, f *os.File, want []int) error {
	if _, err := d.c.pace.Gate.Wait(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	size := d.heads.starts[want[len(want)-1]+1] - d.heads.starts[want[0]]
	need := d.c.room.Blocks(d.heads.starts[want[0]], size)
	if err := d.c.room.Take(ctx, &d.share, need, room.ForDemand); err != nil {
		return fmt.Errorf("header stream: %w", err)
	}
	defer func() {
		d.c.room.Wrote(&d.share, need)
		d.c.room.Remeasure(&d.share)
	}()
	timeout := d.c.cfg.Timeout
	idle := time.AfterFunc(timeout, func() {
		cancel(fmt.Errorf("the source has delivered nothing for %v: %w", timeout, blockdev.ErrUnavailable))
	})
	defer idle.Stop()
	chunks := make([]blockdev.Chunk, len(want))
	for k, i := range want {
		chunks[k] = d.heads.chunk(i, d.tab.Size)
	}
	var returned atomic.Bool
	got := make([]bool, len(want))
	err := d.c.cfg.Source.Fetch(ctx, blockdev.Request{Diff: d.id, Priority: blockdev.Prefetch, Chunks: chunks}, func(k int, data []byte) error {
		if returned.Load() {
			return errors.New("delivered after the request had ended")
		}
		if k < 0 || k >= len(want) {
			return fmt.Errorf("delivered piece number %d of a request for %d", k, len(want))
		}
		p := d.heads.pieces[want[k]]
		if len(data) != int(p.Length) || blockdev.Sum(data) != p.Digest {
			d.c.stats.corrupt.Add(1)
			return fmt.Errorf("diff %v: piece %d of the header stream came with wrong bytes: %w", d.id, want[k], blockdev.ErrCorrupt)
		}
		idle.Reset(timeout)
		got[k] = true
		d.c.stats.headers.Add(int64(len(data)))
		if _, err := f.WriteAt(data, d.heads.starts[want[k]]); err != nil {
			return d.c.room.Failed(d.id, fmt.Errorf("write %s: %w", d.headersPath(), err))
		}
		return nil
	})
	returned.Store(true)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("header stream: %w", err)
	}
	for k, ok := range got {
		if !ok {
			return fmt.Errorf("piece %d of the header stream did not come: %w", want[k], blockdev.ErrUnavailable)
		}
	}
	return nil
}
