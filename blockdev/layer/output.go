package layer

import (
	"context"
	"fmt"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cdc"
)

// job is a chunk or a header piece to be hashed and put.
type job struct {
	data  []byte // in a buffer from output.free
	piece bool
	index int // in output.chunks or output.pieces
}

// output takes the diff divided into content and masked bytes, cuts the masked
// diff into chunks and the header stream into pieces, and puts them through its
// workers.
type output struct {
	ctx  context.Context // of one Build, which outlives no field here
	put  Put
	free chan []byte // buffers of MaxChunk bytes, nil ones not yet made
	jobs chan job

	mu     sync.Mutex // guards the elements of chunks and pieces
	chunks []blockdev.Chunk
	pieces []blockdev.Piece

	max    int // chunks and pieces
	cutter cdc.Chunker
	buf    []byte // the chunk so far
	offset int64  // where it starts

	headers  *headerWriter
	pieceBuf []byte
}

func newOutput(ctx context.Context, put Put, opt Options) (*output, error) {
	workers := opt.Workers
	// Two buffers are being filled, one per worker is being put, and as many
	// wait in between.
	n := 2*workers + 2
	o := &output{ctx: ctx, put: put, free: make(chan []byte, n), jobs: make(chan job, workers), max: opt.MaxChunks}
	for range n {
		o.free <- nil
	}
	var err error
	o.headers, err = newHeaderWriter(pieceWriter{o})
	return o, err
}

// work is one worker.
func (o *output) work() error {
	for j := range o.jobs {
		if o.ctx.Err() != nil {
			return context.Cause(o.ctx)
		}
		d := blockdev.Sum(j.data)
		o.mu.Lock()
		if j.piece {
			o.pieces[j.index].Digest = d
		} else {
			o.chunks[j.index].Digest = d
		}
		o.mu.Unlock()
		if err := o.put(o.ctx, d, j.data); err != nil {
			// Its buffer is lost to the others; the context tells them.
			return fmt.Errorf("storing chunk %v (%d bytes): %w", d, len(j.data), err)
		}
		o.free <- j.data[:0] // never blocks: as many places as buffers
	}
	return nil
}

func (o *output) buffer() ([]byte, error) {
	select {
	case b := <-o.free:
		if b == nil {
			b = make([]byte, 0, blockdev.MaxChunk)
		}
		return b, nil
	case <-o.ctx.Done():
		return nil, context.Cause(o.ctx)
	}
}

func (o *output) send(j job) error {
	select {
	case o.jobs <- j:
		return nil
	case <-o.ctx.Done():
		return context.Cause(o.ctx)
	}
}

// begin says that the content of a file, size bytes, comes next; end, that it
// is through.
func (o *output) begin(size int64) error {
	if o.cutter.Begin(size) {
		return o.cut()
	}
	return nil
}

func (o *output) end() error {
	if o.cutter.End() {
		return o.cut()
	}
	return nil
}

// content takes bytes that stay.
func (o *output) content(p []byte) error {
	if err := o.headers.content(int64(len(p))); err != nil {
		return err
	}
	return o.add(p)
}

// masked takes bytes that are zero in the masked diff.
func (o *output) masked(p []byte) error {
	if err := o.headers.masked(p); err != nil {
		return err
	}
	for n := len(p); n > 0; {
		z := zeros[:min(n, len(zeros))]
		if err := o.add(z); err != nil {
			return err
		}
		n -= len(z)
	}
	return nil
}

// zeros is never written.
var zeros [64 << 10]byte

func (o *output) add(p []byte) error {
	for len(p) > 0 {
		if o.buf == nil {
			var err error
			if o.buf, err = o.buffer(); err != nil {
				return err
			}
		}
		n, cut := o.cutter.Next(p)
		o.buf = append(o.buf, p[:n]...) // never more than MaxChunk
		p = p[n:]
		if cut {
			if err := o.cut(); err != nil {
				return err
			}
		}
	}
	return nil
}

// cut sends off the current chunk.
func (o *output) cut() error {
	if err := o.full(); err != nil {
		return err
	}
	c := blockdev.Chunk{Offset: o.offset, Length: uint32(len(o.buf))} // at most MaxChunk
	o.mu.Lock()
	o.chunks = append(o.chunks, c)
	o.mu.Unlock()
	j := job{data: o.buf, index: len(o.chunks) - 1}
	o.offset += int64(len(o.buf))
	o.buf = nil
	return o.send(j)
}

// full is an error if an index has no room for one more chunk or piece, so that a layer
// that is too large is not fetched to its end.
func (o *output) full() error {
	if len(o.chunks)+len(o.pieces) < o.max {
		return nil
	}
	return unsupported("after %d GiB the layer has %d chunks, and an index can list no more: divide the layer into several", o.offset>>30, len(o.chunks))
}

// flush sends off what is left.
func (o *output) flush() error {
	if err := o.headers.close(); err != nil {
		return err
	}
	if len(o.pieceBuf) > 0 {
		if err := o.cutPiece(); err != nil {
			return err
		}
	}
	if len(o.buf) > 0 {
		return o.cut()
	}
	return nil
}

func (o *output) cutPiece() error {
	if err := o.full(); err != nil {
		return err
	}
	o.mu.Lock()
	o.pieces = append(o.pieces, blockdev.Piece{Length: uint32(len(o.pieceBuf))}) // at most MaxChunk
	o.mu.Unlock()
	j := job{data: o.pieceBuf, piece: true, index: len(o.pieces) - 1}
	o.pieceBuf = nil
	return o.send(j)
}

// pieceWriter is where the compressed header stream goes.
type pieceWriter struct{ o *output }

func (w pieceWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		if w.o.pieceBuf == nil {
			if w.o.pieceBuf, err = w.o.buffer(); err != nil {
				return n, err
			}
		}
		k := min(len(p), blockdev.MaxChunk-len(w.o.pieceBuf))
		w.o.pieceBuf = append(w.o.pieceBuf, p[:k]...)
		n, p = n+k, p[k:]
		if len(w.o.pieceBuf) == blockdev.MaxChunk {
			if err := w.o.cutPiece(); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}
