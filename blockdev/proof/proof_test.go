package proof

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/layer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newLayer(t *testing.T) *blockdevtest.Layer {
	t.Helper()
	l, err := blockdevtest.NewLayer(
		blockdevtest.File{Name: "bin/program", Data: blockdevtest.Bytes(1, 3<<20)},
		blockdevtest.File{Name: "etc/empty"},
		blockdevtest.File{Name: "etc/text", Data: []byte(strings.Repeat("shoal ", 10_000))},
	)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// pieces gives the header stream of l.
func pieces(l *blockdevtest.Layer) Piece {
	byDigest := make(map[blockdev.Digest][]byte)
	for i, p := range l.Index.Headers {
		byDigest[p.Digest] = l.Pieces[i]
	}
	return func(_ context.Context, p blockdev.Piece) ([]byte, error) {
		if b, ok := byDigest[p.Digest]; ok {
			return b, nil
		}
		return nil, blockdev.ErrNotFound
	}
}

func TestProven(t *testing.T) {
	l := newLayer(t)
	if own, err := Run(t.Context(), l.Index, bytes.NewReader(l.Masked), pieces(l)); err != nil || own != nil {
		t.Errorf("%v, another index: %v", err, own != nil)
	}
	empty, err := blockdevtest.NewLayer()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), empty.Index, bytes.NewReader(empty.Masked), pieces(empty)); err != nil {
		t.Errorf("a layer without files: %v", err)
	}
}

// TestLies: whatever a supernode says that is not so, it is found out, and said.
func TestLies(t *testing.T) {
	l := newLayer(t)
	other, err := blockdevtest.NewLayer(blockdevtest.File{Name: "bin/program", Data: blockdevtest.Bytes(2, 3<<20)})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		edit   func(*blockdev.Index)
		masked []byte
		from   *blockdevtest.Layer
		says   string
	}{
		"another diff":           {from: other, edit: func(ix *blockdev.Index) { ix.DiffID = l.Index.DiffID }, says: "digest"},
		"one byte of metadata":   {edit: func(ix *blockdev.Index) { ix.Meta[2000] ^= 1 }, says: "byte 2000"},
		"metadata cut short":     {edit: func(ix *blockdev.Index) { ix.Meta = ix.Meta[:1024] }, says: "metadata"},
		"metadata of another":    {edit: func(ix *blockdev.Index) { ix.Meta = other.Index.Meta }, says: "metadata"},
		"an implied directory":   {edit: func(ix *blockdev.Index) { ix.Implied = append(ix.Implied, "zzz") }, says: "implied"},
		"no implied directories": {edit: func(ix *blockdev.Index) { ix.Implied = nil }, says: "implied"},
		"other chunk borders": {edit: func(ix *blockdev.Index) {
			a, b := &ix.Chunks[0], &ix.Chunks[1]
			a.Length--
			b.Offset--
			b.Length++
			a.Digest, b.Digest = blockdev.Sum(l.Masked[:a.Length]), blockdev.Sum(l.Masked[b.Offset:][:b.Length])
		}, says: "chunk 0"},
		"other content": {masked: func() []byte {
			b := bytes.Clone(l.Masked)
			b[100_000] ^= 1
			return b
		}(), says: "digest"},
		"shorter":        {edit: func(ix *blockdev.Index) { ix.DiffSize -= 512 }, says: "header"},
		"no headers":     {edit: func(ix *blockdev.Index) { ix.Headers = nil }, says: "header"},
		"pieces swapped": {edit: func(ix *blockdev.Index) { ix.Headers = append(ix.Headers, ix.Headers[0]) }, says: ""},
	} {
		t.Run(name, func(t *testing.T) {
			from := l
			if c.from != nil {
				from = c.from
			}
			ix, masked := from.Clone(), from.Masked
			if c.edit != nil {
				c.edit(ix)
			}
			if c.masked != nil {
				masked = c.masked
			}
			_, err := Run(t.Context(), ix, bytes.NewReader(masked), pieces(from))
			if !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want a mismatch that says %q", err, c.says)
			}
		})
	}
}

// TestAnotherBuilder: an index that another version of the builder has made is not
// accused for its tree, and not used any more. What no builder may change is.
func TestAnotherBuilder(t *testing.T) {
	l := newLayer(t)
	const other = layer.BuilderVersion + 1
	for name, edit := range map[string]func(*blockdev.Index){
		"the same tree":          func(*blockdev.Index) {},
		"one byte of metadata":   func(ix *blockdev.Index) { ix.Meta[2000] ^= 1 },
		"no implied directories": func(ix *blockdev.Index) { ix.Implied = nil },
	} {
		ix := l.Clone()
		ix.Builder = other
		edit(ix)
		own, err := Run(t.Context(), ix, bytes.NewReader(l.Masked), pieces(l))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if same := name == "the same tree"; same && own != nil || !same && !reflect.DeepEqual(own, l.Index) {
			t.Errorf("%s: the index to use is not the one that this builder makes", name)
		}
	}
	ix := l.Clone()
	ix.Builder = other
	a, b := &ix.Chunks[0], &ix.Chunks[1]
	a.Length--
	b.Offset--
	b.Length++
	a.Digest, b.Digest = blockdev.Sum(l.Masked[:a.Length]), blockdev.Sum(l.Masked[b.Offset:][:b.Length])
	if _, err := Run(t.Context(), ix, bytes.NewReader(l.Masked), pieces(l)); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), fmt.Sprintf("builder version %d", other)) {
		t.Errorf("other chunk borders: %v", err)
	}
}

// TestNoLie: what could not be read says nothing about the index.
func TestNoLie(t *testing.T) {
	l := newLayer(t)
	boom := errors.New("boom")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx    context.Context
		masked io.ReaderAt
		piece  Piece
		want   error
	}{
		"masked diff": {masked: failing{l.Masked, 1 << 20, boom}, want: boom},
		"damage":      {masked: failing{l.Masked, 1 << 20, blockdev.ErrCorrupt}, want: blockdev.ErrCorrupt},
		"piece":       {piece: func(context.Context, blockdev.Piece) ([]byte, error) { return nil, blockdev.ErrUnavailable }, want: blockdev.ErrUnavailable},
		"cancelled":   {ctx: cancelled, want: context.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			if c.ctx == nil {
				c.ctx = t.Context()
			}
			if c.masked == nil {
				c.masked = bytes.NewReader(l.Masked)
			}
			if c.piece == nil {
				c.piece = pieces(l)
			}
			_, err := Run(c.ctx, l.Index, c.masked, c.piece)
			if !errors.Is(err, c.want) || errors.Is(err, ErrMismatch) {
				t.Errorf("%v, want %v and no mismatch", err, c.want)
			}
		})
	}
}

// failing is a file that cannot be read from a certain byte on.
type failing struct {
	data []byte
	from int64
	err  error
}

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.from {
		return 0, f.err
	}
	return copy(p, f.data[off:]), nil
}

func BenchmarkRun(b *testing.B) {
	l, err := blockdevtest.NewLayer(blockdevtest.File{Name: "f", Data: blockdevtest.Bytes(1, 64<<20)})
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(l.Tar)))
	for b.Loop() {
		if _, err := Run(b.Context(), l.Index, bytes.NewReader(l.Masked), pieces(l)); err != nil {
			b.Fatal(err)
		}
	}
}
