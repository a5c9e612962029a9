package blockdevtest

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/layer"
)

// File is one regular file of a Layer.
type File struct {
	Name string
	Data []byte
}

// Layer is a whole layer: a tar, and what layer.Build makes of it. Unlike that
// of Diff, its index can be proven.
type Layer struct {
	Index *blockdev.Index
	// Tar is the diff, Masked the masked diff.
	Tar, Masked []byte
	// Pieces are the header stream's, in the order of Index.Headers.
	Pieces [][]byte
}

// NewLayer makes a Layer of these files.
func NewLayer(files ...File) (*Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.Name, Mode: 0o644, Size: int64(len(f.Data))})
		if err == nil {
			_, err = w.Write(f.Data)
		}
		if err != nil {
			return nil, fmt.Errorf("file %s: %w", f.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	l := &Layer{Tar: b.Bytes()}
	var mu sync.Mutex
	put := make(map[blockdev.Digest][]byte)
	var err error
	l.Index, err = layer.Build(context.Background(), bytes.NewReader(l.Tar), func(_ context.Context, d blockdev.Digest, data []byte) error {
		mu.Lock()
		defer mu.Unlock()
		put[d] = bytes.Clone(data)
		return nil
	}, layer.Options{})
	if err != nil {
		return nil, err
	}
	for _, c := range l.Index.Chunks {
		l.Masked = append(l.Masked, put[c.Digest]...)
	}
	for _, p := range l.Index.Headers {
		l.Pieces = append(l.Pieces, put[p.Digest])
	}
	return l, nil
}

// Clone returns a copy of the index, for a test to change.
func (l *Layer) Clone() *blockdev.Index {
	ix := *l.Index
	ix.Meta = bytes.Clone(ix.Meta)
	ix.Chunks = slices.Clone(ix.Chunks)
	ix.Headers = slices.Clone(ix.Headers)
	ix.Implied = slices.Clone(ix.Implied)
	return &ix
}

// PutLayer adds every chunk and header piece of l.
func (m *Memory) PutLayer(l *Layer) {
	m.PutDiff(l.Index, l.Masked)
	for _, p := range l.Pieces {
		m.Put(p)
	}
}
