package layer

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/shoalfs/shoal/blockdev"
)

// Restore writes the diff that ix was built from to w: the masked diff, which
// it reads from masked, with the header stream's bytes put back in. piece gives
// the bytes of one of ix.Headers; they are used until the next call. At the end
// the SHA-256 of what was written is compared with ix.DiffID.
//
// The error wraps blockdev.ErrCorrupt if the masked diff, a piece or the stream
// is not what ix says (w has then got wrong bytes), or the error of piece,
// masked or w, or the context's.
func Restore(ctx context.Context, ix *blockdev.Index, masked io.ReaderAt,
	piece func(context.Context, blockdev.Piece) ([]byte, error), w io.Writer,
) error {
	if err := restore(ctx, ix, masked, piece, w); err != nil {
		return fmt.Errorf("restoring diff %v: %w", ix.DiffID, err)
	}
	return nil
}

func restore(ctx context.Context, ix *blockdev.Index, masked io.ReaderAt,
	piece func(context.Context, blockdev.Piece) ([]byte, error), w io.Writer,
) error {
	if ix.DiffSize < 0 {
		return corrupt("index says that the diff has %d bytes", ix.DiffSize)
	}
	pieces := &pieceReader{ctx: ctx, left: ix.Headers, get: piece}
	hr, err := newHeaderReader(pieces)
	if err != nil {
		return err
	}
	defer hr.close()

	c := copier{w: w, sum: sha256.New(), buf: make([]byte, inputBlock)}
	for at := int64(0); ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		content, hidden, err := hr.next(ix.DiffSize - at)
		if ended(err) {
			if at != ix.DiffSize {
				return corrupt("header stream ends at byte %d of %d", at, ix.DiffSize)
			}
			break
		}
		if err != nil {
			return pieces.explain(err, at)
		}
		err = c.copy(io.NewSectionReader(masked, at, content), content, func(err error) error {
			if ended(err) || errors.Is(err, io.ErrUnexpectedEOF) {
				return corrupt("masked diff ends after byte %d, not at %d", at, ix.DiffSize)
			}
			return fmt.Errorf("reading content after byte %d: %w", at, err)
		})
		if err != nil {
			return err
		}
		at += content
		err = c.copy(hr.br, hidden, func(err error) error { return pieces.explain(err, at) })
		if err != nil {
			return err
		}
		at += hidden
	}
	if got := blockdev.Digest(c.sum.Sum(nil)); got != ix.DiffID {
		return corrupt("what was restored has the digest %v", got)
	}
	return nil
}

// copier writes to w and hashes what it wrote.
type copier struct {
	w   io.Writer
	sum hash.Hash
	buf []byte
}

// copy copies n bytes of r. Errors of r go through explain.
func (c *copier) copy(r io.Reader, n int64, explain func(error) error) error {
	for n > 0 {
		b := c.buf[:min(n, int64(len(c.buf)))]
		if _, err := io.ReadFull(r, b); err != nil {
			return explain(err)
		}
		c.sum.Write(b) // a hash.Hash never fails
		if _, err := c.w.Write(b); err != nil {
			return fmt.Errorf("writing the diff: %w", err)
		}
		n -= int64(len(b))
	}
	return nil
}

// pieceReader joins the pieces of a header stream.
type pieceReader struct {
	ctx  context.Context // of one Restore
	left []blockdev.Piece
	get  func(context.Context, blockdev.Piece) ([]byte, error)
	data []byte
	err  error // of get, or about a piece
}

func (p *pieceReader) Read(b []byte) (int, error) {
	if p.err != nil {
		return 0, p.err
	}
	for len(p.data) == 0 {
		if len(p.left) == 0 {
			return 0, io.EOF
		}
		if p.data, p.err = p.fetch(p.left[0]); p.err != nil {
			return 0, p.err
		}
		p.left = p.left[1:]
	}
	n := copy(b, p.data)
	p.data = p.data[n:]
	return n, nil
}

func (p *pieceReader) fetch(h blockdev.Piece) ([]byte, error) {
	if h.Length == 0 || h.Length > blockdev.MaxChunk {
		return nil, corrupt("piece %v of the header stream has %d bytes", h.Digest, h.Length)
	}
	data, err := p.get(p.ctx, h)
	if err != nil {
		return nil, fmt.Errorf("piece %v of the header stream: %w", h.Digest, err)
	}
	if err := h.Check(data); err != nil {
		return nil, fmt.Errorf("header stream: %w", err)
	}
	return data, nil
}

// explain tells an error of getting pieces from one of what they hold. at is
// how far the diff has got, in bytes.
func (p *pieceReader) explain(err error, at int64) error {
	switch {
	case p.err != nil:
		return fmt.Errorf("at byte %d: %w", at, p.err)
	case errors.Is(err, blockdev.ErrCorrupt):
		return fmt.Errorf("at byte %d: %w", at, err)
	default:
		return corrupt("at byte %d: header stream does not decode: %w", at, err)
	}
}
