package layer

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/shoalfs/shoal/blockdev"
)

const (
	inputBlock  = 256 << 10 // bytes read at a time
	inputBlocks = 8         // blocks between the reader and its two users
)

// block is a part of the diff on its way to the scanner and to the hash of the
// whole, which both only look at it.
type block struct {
	buf  []byte // of inputBlock bytes
	data []byte
	refs atomic.Int32
}

// input reads the diff in a goroutine of its own and hands each block to hash,
// which runs in another, and to the scanner, which uses next.
type input struct {
	ctx     context.Context // of one Build, which outlives no field here
	free    chan *block
	scans   chan *block
	sums    chan *block
	readErr error // why reading ended; set before scans is closed

	cur    *block
	rest   []byte // of cur, not yet consumed
	offset int64  // bytes consumed
}

func newInput(ctx context.Context) *input {
	in := &input{
		ctx:   ctx,
		free:  make(chan *block, inputBlocks),
		scans: make(chan *block, inputBlocks),
		sums:  make(chan *block, inputBlocks),
	}
	for range inputBlocks {
		in.free <- new(block)
	}
	return in
}

// read is the reading goroutine. Blocks are filled up, so that a pipe that
// gives a few bytes at a time costs no more than one that gives many.
func (in *input) read(r io.Reader) error {
	defer close(in.sums)
	defer close(in.scans)
	for total := int64(0); ; {
		var b *block
		select {
		case b = <-in.free:
		case <-in.ctx.Done():
			return context.Cause(in.ctx)
		}
		if b.buf == nil {
			b.buf = make([]byte, inputBlock)
		}
		n, err := in.fill(b.buf, r)
		total += int64(n)
		if n > 0 {
			b.data = b.buf[:n]
			b.refs.Store(2)
			in.scans <- b // never blocks: as many places as blocks
			in.sums <- b
		}
		if ended(err) {
			return nil
		}
		if err != nil {
			in.readErr = fmt.Errorf("reading the diff at byte %d: %w", total, err)
			return in.readErr
		}
	}
}

// ended says whether a reader's error is the end of what it reads. One that only
// wraps io.EOF is not: a connection that broke gives such errors, and then bytes
// are missing.
func ended(err error) bool {
	return err == io.EOF //nolint:errorlint // wrapped it is a failure, see above
}

// fill is io.ReadFull that looks at the context between reads and returns
// io.EOF also after some bytes.
func (in *input) fill(buf []byte, r io.Reader) (n int, err error) {
	for empty := 0; n < len(buf); {
		if in.ctx.Err() != nil {
			return n, context.Cause(in.ctx)
		}
		k, err := r.Read(buf[n:])
		if n += k; err != nil {
			return n, err
		}
		if k > 0 {
			empty = 0
		} else if empty++; empty == 100 {
			return n, io.ErrNoProgress
		}
	}
	return n, nil
}

func (in *input) release(b *block) {
	if b.refs.Add(-1) == 0 {
		in.free <- b
	}
}

// hash is the goroutine that computes the DiffID.
func (in *input) hash() blockdev.Digest {
	h := sha256.New()
	for b := range in.sums {
		h.Write(b.data) // a hash.Hash never fails
		in.release(b)
	}
	return blockdev.Digest(h.Sum(nil))
}

// next returns the bytes to come, at most n of them and at least one. consume
// says how many were used. It returns io.EOF at the end of the diff.
func (in *input) next(n int64) ([]byte, error) {
	for len(in.rest) == 0 {
		if in.cur != nil {
			in.release(in.cur)
			in.cur = nil
		}
		if in.ctx.Err() != nil {
			return nil, context.Cause(in.ctx)
		}
		b, ok := <-in.scans // closed when reading ends, for whatever reason
		if !ok {
			if in.ctx.Err() != nil {
				return nil, context.Cause(in.ctx)
			}
			if in.readErr != nil {
				return nil, in.readErr
			}
			return nil, io.EOF
		}
		in.cur, in.rest = b, b.data
	}
	return in.rest[:min(n, int64(len(in.rest)))], nil
}

func (in *input) consume(n int) {
	in.rest = in.rest[n:]
	in.offset += int64(n)
}
