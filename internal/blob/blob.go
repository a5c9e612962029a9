// Package blob reads layers as registries have them: a tar stream, compressed with gzip,
// zstd or not at all. A supernode that ingests a layer and a node that reads one straight
// from its registry both start with it.
package blob

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/blob/gunzip"
)

// maxWindow bounds the memory that a zstd frame may ask for, in bytes: what
// containerd's decompressor takes too. Only zstd --ultra or --long need more.
const maxWindow = 64 << 20

// foreignMagic are compressions that are recognised in order to name them.
var foreignMagic = []struct{ name, magic string }{
	{"xz", "\xfd7zXZ\x00"},
	{"bzip2", "BZh"},
	{"lz4", "\x04\x22\x4d\x18"},
}

// Decompress returns the tar stream in r, a layer as a registry has it: gzip, zstd
// or neither. It buffers r. Errors are r's, or wrap blockdev.ErrCorrupt or
// blockdev.ErrUnsupported.
func Decompress(r io.Reader) (*Tar, error) {
	in := &source{r: r}
	br := bufio.NewReaderSize(in, 256<<10)
	head, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gunzip.NewReader(br)
		if err != nil {
			return nil, in.explain("gzip", err)
		}
		return &Tar{r: z, in: in, name: "gzip", close: func() {}}, nil
	case isZstd(head):
		z, err := zstd.NewReader(br,
			zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, in.explain("zstd", err)
		}
		return &Tar{r: z, in: in, name: "zstd", close: z.Close}, nil
	}
	for _, m := range foreignMagic {
		if strings.HasPrefix(string(head), m.magic) {
			return nil, fmt.Errorf("the layer is compressed with %s, not gzip or zstd: %w", m.name, blockdev.ErrUnsupported)
		}
	}
	return &Tar{r: br, in: in, name: "tar", close: func() {}}, nil
}

// isZstd recognises a zstd frame or, as zstd:chunked may begin with, a
// skippable one.
func isZstd(b []byte) bool {
	return bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}) ||
		len(b) >= 4 && b[0]&0xf0 == 0x50 && b[1] == 0x2a && b[2] == 0x4d && b[3] == 0x18
}

// source remembers the error of the compressed stream, which a decompressor may
// hide behind one of its own.
type source struct {
	r   io.Reader
	err error
}

// Read implements io.Reader.
func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// explain says whether the stream broke or its content is wrong.
func (s *source) explain(name string, err error) error {
	switch {
	case s.err != nil:
		return s.err
	case errors.Is(err, zstd.ErrWindowSizeExceeded) || errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("the layer's zstd frame needs a window of more than %d MiB (zstd --ultra or --long): %w", maxWindow>>20, blockdev.ErrUnsupported)
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%s stream: %w: %w", name, blockdev.ErrCorrupt, err)
}

// Tar is the tar stream of a layer. Its Read returns the error of the compressed stream,
// or one that wraps blockdev.ErrCorrupt or blockdev.ErrUnsupported. Close it.
type Tar struct {
	r     io.Reader
	in    *source
	name  string
	close func()
}

// Read implements io.Reader.
func (t *Tar) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = t.in.explain(t.name, err)
	}
	return n, err
}

// Trailing says whether bytes that are no gzip follow the gzip stream. It is known when
// Read has returned io.EOF.
func (t *Tar) Trailing() bool {
	z, ok := t.r.(*gunzip.Reader)
	return ok && z.Trailing()
}

// Close frees the decompressor.
func (t *Tar) Close() { t.close() }
