package layer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shoalfs/shoal/blockdev"
)

func TestRestoreRefuses(t *testing.T) {
	diff := makeTar(file("a", string(randomBytes(1, 100_000))), file("b", "more"))
	m := newMemory()
	ix, err := Build(t.Context(), bytes.NewReader(diff), m.put, Options{})
	if err != nil {
		t.Fatal(err)
	}
	masked, err := m.masked(ix)
	if err != nil {
		t.Fatal(err)
	}
	stream := m.data[ix.Headers[0].Digest]
	boom := errors.New("boom")
	piece := func(b []byte, err error) func(context.Context, blockdev.Piece) ([]byte, error) {
		return func(context.Context, blockdev.Piece) ([]byte, error) { return b, err }
	}
	changed := bytes.Clone(masked)
	changed[1000] ^= 1
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	tests := []struct {
		name   string
		masked []byte
		piece  func(context.Context, blockdev.Piece) ([]byte, error)
		w      io.Writer
		edit   func(*blockdev.Index)
		want   error
	}{
		{name: "other content", masked: changed, want: blockdev.ErrCorrupt},
		{name: "short masked diff", masked: masked[:50_000], want: blockdev.ErrCorrupt},
		{name: "another piece", piece: piece(append([]byte{1}, stream[1:]...), nil), want: blockdev.ErrCorrupt},
		{name: "short piece", piece: piece(stream[:10], nil), want: blockdev.ErrCorrupt},
		{name: "no piece", piece: piece(nil, boom), want: boom},
		{name: "connection broke", piece: piece(nil, errBroken), want: errBroken},
		{name: "writer", w: failingWriter{boom}, want: boom},
		{name: "stream too long", edit: func(ix *blockdev.Index) { ix.DiffSize-- }, want: blockdev.ErrCorrupt},
		{name: "stream too short", edit: func(ix *blockdev.Index) { ix.DiffSize++ }, want: blockdev.ErrCorrupt},
		{name: "negative size", edit: func(ix *blockdev.Index) { ix.DiffSize = -1 }, want: blockdev.ErrCorrupt},
		{name: "no headers", edit: func(ix *blockdev.Index) { ix.Headers = nil }, want: blockdev.ErrCorrupt},
		{name: "huge piece", edit: func(ix *blockdev.Index) { ix.Headers[0].Length = blockdev.MaxChunk + 1 }, want: blockdev.ErrCorrupt},
		{name: "other DiffID", edit: func(ix *blockdev.Index) { ix.DiffID[0] ^= 1 }, want: blockdev.ErrCorrupt},
		{name: "empty records", edit: func(ix *blockdev.Index) {
			b := enc.EncodeAll(make([]byte, 1<<20), nil)
			d := blockdev.Sum(b)
			m.data[d] = b
			ix.Headers = []blockdev.Piece{{Length: uint32(len(b)), Digest: d}}
		}, want: blockdev.ErrCorrupt},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			x := *ix
			x.Headers = append([]blockdev.Piece(nil), ix.Headers...)
			if tt.edit != nil {
				tt.edit(&x)
			}
			if tt.masked == nil {
				tt.masked = masked
			}
			if tt.piece == nil {
				tt.piece = m.piece
			}
			if tt.w == nil {
				tt.w = io.Discard
			}
			err := Restore(t.Context(), &x, bytes.NewReader(tt.masked), tt.piece, tt.w)
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			if !errors.Is(tt.want, blockdev.ErrCorrupt) && errors.Is(err, blockdev.ErrCorrupt) {
				t.Errorf("%v blames the data", err)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Restore(ctx, ix, bytes.NewReader(masked), m.piece, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

type failingWriter struct{ err error }

func (f failingWriter) Write([]byte) (int, error) { return 0, f.err }

// The header stream as docs/formats.md has it, byte by byte.
func TestHeaderStream(t *testing.T) {
	diff := makeTar(file("a", "content"))
	m := newMemory()
	ix, err := Build(t.Context(), bytes.NewReader(diff), m.put, Options{})
	if err != nil {
		t.Fatal(err)
	}
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	got, err := dec.DecodeAll(m.data[ix.Headers[0].Digest], nil)
	if err != nil {
		t.Fatal(err)
	}
	want := append([]byte{0, 0x80, 4}, diff[:512]...)        // no content, 512 bytes masked
	want = append(append(want, 7, 0xf9, 0xb), diff[519:]...) // 7 of content, 505+1024 masked
	if !bytes.Equal(got, want) {
		t.Errorf("stream is %q, want %q", got, want)
	}
}
