package ingest

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

// layerTypes are the media types of layers that are tar streams. Their
// compression is found out from the bytes, as containerd does: the names are
// often wrong, and Docker's plain type may be compressed.
var layerTypes = map[string]bool{
	"application/vnd.oci.image.layer.v1.tar":                       true,
	"application/vnd.oci.image.layer.v1.tar+gzip":                  true,
	"application/vnd.oci.image.layer.v1.tar+zstd":                  true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": true,
	"application/vnd.docker.image.rootfs.diff.tar":                 true,
	"application/vnd.docker.image.rootfs.diff.tar.gzip":            true,
	"application/vnd.docker.image.rootfs.diff.tar.zstd":            true,
	"application/vnd.docker.image.rootfs.foreign.diff.tar":         true,
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    true,
}

const schema1Type = "application/vnd.docker.container.image.rootfs.diff+x-gtar"

// checkMediaType returns an error that wraps blockdev.ErrUnsupported for what is
// no tar layer.
func checkMediaType(t string) error {
	switch {
	case layerTypes[t]:
		return nil
	case strings.HasSuffix(t, "+encrypted"):
		return fmt.Errorf("the layer is encrypted (%.120q): %w", t, blockdev.ErrUnsupported)
	case t == schema1Type:
		return fmt.Errorf("the layer is of a schema 1 manifest: %w", blockdev.ErrUnsupported)
	default:
		return fmt.Errorf("layer media type %.120q: %w", t, blockdev.ErrUnsupported)
	}
}

// foreign tells whether a layer of this type need not be in the registry.
func foreign(t string) bool {
	return strings.Contains(t, ".foreign.") || strings.Contains(t, ".nondistributable.")
}

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
// or neither. The reader's errors wrap blockdev.ErrCorrupt or
// blockdev.ErrUnsupported, or are r's.
func Decompress(r io.Reader) (io.ReadCloser, error) {
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
		return &tarStream{r: z, in: in, name: "gzip", close: func() {}}, nil
	case isZstd(head):
		z, err := zstd.NewReader(br,
			zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, in.explain("zstd", err)
		}
		return &tarStream{r: z, in: in, name: "zstd", close: z.Close}, nil
	}
	for _, m := range foreignMagic {
		if strings.HasPrefix(string(head), m.magic) {
			return nil, fmt.Errorf("the layer is compressed with %s, not gzip or zstd: %w", m.name, blockdev.ErrUnsupported)
		}
	}
	return io.NopCloser(br), nil
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

// tarStream is a decompressor whose errors are explained.
type tarStream struct {
	r     io.Reader
	in    *source
	name  string
	close func()
}

// Read implements io.Reader.
func (t *tarStream) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = t.in.explain(t.name, err)
	}
	return n, err
}

// trailing says whether something that is not compressed follows what was.
func (t *tarStream) trailing() bool {
	z, ok := t.r.(*gunzip.Reader)
	return ok && z.Trailing()
}

// Close frees the decompressor.
func (t *tarStream) Close() error {
	t.close()
	return nil
}
