package proof

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/layer"
)

// ErrMismatch: the index does not belong to the DiffID that it names. The error
// that wraps it says what differs first.
var ErrMismatch = errors.New("the index is not that of its DiffID")

// Piece gives the bytes of one of the index's Headers, which it has checked
// against their digest. They are used until the next call.
type Piece func(ctx context.Context, p blockdev.Piece) ([]byte, error)

// Run proves ix. masked is the masked diff; what it returns must have been
// checked against ix.Chunks. It returns nil if ix is what this build makes of the
// diff; if another builder has made ix, and another tree, the index to use in its
// place: that of this build, with the chunks and header pieces of ix. The error wraps
// ErrMismatch, or is that of masked or piece, or the context's.
func Run(ctx context.Context, ix *blockdev.Index, masked io.ReaderAt, piece Piece) (*blockdev.Index, error) {
	in := &input{masked: masked, piece: piece}
	pr, pw := io.Pipe()
	var (
		wg       sync.WaitGroup
		rebuilt  *blockdev.Index
		buildErr error
	)
	wg.Go(func() {
		rebuilt, buildErr = layer.Build(ctx, pr, discard, layer.Options{Workers: 1, Background: true})
		if buildErr != nil {
			// The rest is still to be hashed: whether this is the diff at all is the
			// first question.
			_, _ = io.Copy(io.Discard, pr)
		}
	})
	restoreErr := layer.Restore(ctx, ix, in, in.get, pw)
	_ = pw.CloseWithError(restoreErr) // never fails
	wg.Wait()

	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("proof of diff %v: %w", ix.DiffID, context.Cause(ctx))
	case in.err != nil:
		return nil, fmt.Errorf("proof of diff %v: %w", ix.DiffID, in.err)
	case restoreErr != nil:
		return nil, fmt.Errorf("%w: %w", ErrMismatch, restoreErr)
	case buildErr != nil:
		return nil, fmt.Errorf("diff %v: %w: the diff has its DiffID, but %w%s", ix.DiffID, ErrMismatch, buildErr, builders(ix))
	}
	if err := compareData(ix, rebuilt); err != nil {
		return nil, fmt.Errorf("diff %v: %w: %w%s", ix.DiffID, ErrMismatch, err, builders(ix))
	}
	if err := compareTree(ix, rebuilt); err != nil {
		if ix.Builder == layer.BuilderVersion {
			return nil, fmt.Errorf("diff %v: %w: %w", ix.DiffID, ErrMismatch, err)
		}
		rebuilt.Headers = ix.Headers // the encoder's version may be another, too
		return rebuilt, nil
	}
	return nil, nil
}

// builders is the end of an error: that another builder has made the index may be why
// it does not fit.
func builders(ix *blockdev.Index) string {
	if ix.Builder == layer.BuilderVersion {
		return ""
	}
	return fmt.Sprintf(" (the index is of builder version %d, this program has %d: supernode and node of one version may agree)", ix.Builder, layer.BuilderVersion)
}

// discard takes the chunks that Build makes, of which only the digests count.
func discard(context.Context, blockdev.Digest, []byte) error { return nil }

// compareData says what differs between the given index and the one that the diff
// gives, in what is the same for all builders.
func compareData(given, diff *blockdev.Index) error {
	if given.DiffSize != diff.DiffSize {
		return fmt.Errorf("the diff has %d bytes, the index says %d", diff.DiffSize, given.DiffSize)
	}
	if !slices.Equal(given.Chunks, diff.Chunks) {
		n := min(len(given.Chunks), len(diff.Chunks))
		at := 0
		for at < n && given.Chunks[at] == diff.Chunks[at] {
			at++
		}
		return fmt.Errorf("the chunk table differs from chunk %d on (%d chunks, the diff gives %d)", at, len(given.Chunks), len(diff.Chunks))
	}
	return nil
}

// compareTree says what differs in the tree of files.
func compareTree(given, diff *blockdev.Index) error {
	if !bytes.Equal(given.Meta, diff.Meta) {
		n := min(len(given.Meta), len(diff.Meta))
		at := 0
		for at < n && given.Meta[at] == diff.Meta[at] {
			at++
		}
		return fmt.Errorf("the metadata differs from byte %d on (%d bytes, the diff gives %d)", at, len(given.Meta), len(diff.Meta))
	}
	if !slices.Equal(given.Implied, diff.Implied) {
		return fmt.Errorf("the implied directories differ (%d, the diff gives %d)", len(given.Implied), len(diff.Implied))
	}
	return nil
}

// input remembers why bytes could not be had, which is nobody's mismatch. Both
// methods are called by one goroutine.
type input struct {
	masked io.ReaderAt
	piece  Piece
	err    error
}

// ReadAt implements io.ReaderAt.
func (in *input) ReadAt(p []byte, off int64) (int, error) {
	n, err := in.masked.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		in.err = err
	}
	return n, err
}

func (in *input) get(ctx context.Context, p blockdev.Piece) ([]byte, error) {
	b, err := in.piece(ctx, p)
	if err != nil {
		in.err = err
	}
	return b, err
}
