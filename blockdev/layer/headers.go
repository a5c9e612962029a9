package layer

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// The header stream says which bytes of a diff are content and holds all the
// others. docs/formats.md, section "Header stream", describes it.
const (
	// headerRun is how many masked bytes the writer puts into a record at most;
	// longer runs take several. Readers take any number.
	headerRun = 32 << 10
	// headerWindow and headerWindowMax bound the memory of writers and readers,
	// in bytes.
	headerWindow    = 1 << 20
	headerWindowMax = 8 << 20
)

// headerWriter writes records: the number of content bytes that come first, the
// number of masked bytes behind them, and these.
type headerWriter struct {
	enc   *zstd.Encoder
	count int64  // content bytes of the record so far
	run   []byte // masked bytes of the record so far
	used  bool   // there has been a record
	head  [2 * binary.MaxVarintLen64]byte
}

// newHeaderWriter compresses on the caller's goroutine and leaves out zstd's
// checksum: the DiffID proves the whole.
func newHeaderWriter(w io.Writer) (*headerWriter, error) {
	enc, err := zstd.NewWriter(w,
		zstd.WithEncoderLevel(zstd.SpeedDefault),
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false),
		zstd.WithWindowSize(headerWindow),
		zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("compressing headers: %w", err)
	}
	return &headerWriter{enc: enc, run: make([]byte, 0, headerRun)}, nil
}

// content says that the next n bytes of the diff are content.
func (h *headerWriter) content(n int64) error {
	if len(h.run) > 0 {
		if err := h.record(); err != nil {
			return err
		}
	}
	h.count += n
	return nil
}

// masked takes the next bytes of the diff, which are none.
func (h *headerWriter) masked(p []byte) error {
	for len(p) > 0 {
		n := min(len(p), headerRun-len(h.run))
		h.run = append(h.run, p[:n]...)
		p = p[n:]
		if len(h.run) == headerRun {
			if err := h.record(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (h *headerWriter) record() error {
	b := binary.AppendUvarint(h.head[:0], uint64(h.count)) // never negative
	b = binary.AppendUvarint(b, uint64(len(h.run)))
	if _, err := h.enc.Write(b); err != nil {
		return fmt.Errorf("writing the header stream: %w", err)
	}
	if _, err := h.enc.Write(h.run); err != nil {
		return fmt.Errorf("writing the header stream: %w", err)
	}
	h.count, h.run, h.used = 0, h.run[:0], true
	return nil
}

// close writes the last record, if there is something to say, and the end of
// the zstd frame.
func (h *headerWriter) close() error {
	if h.count > 0 || len(h.run) > 0 {
		if err := h.record(); err != nil {
			return err
		}
	}
	if !h.used { // no frame around nothing
		return nil
	}
	if err := h.enc.Close(); err != nil {
		return fmt.Errorf("ending the header stream: %w", err)
	}
	return nil
}

// headerReader reads the records of a header stream.
type headerReader struct {
	dec *zstd.Decoder
	br  *bufio.Reader
}

func newHeaderReader(r io.Reader) (*headerReader, error) {
	dec, err := zstd.NewReader(r,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(headerWindowMax))
	if err != nil {
		return nil, fmt.Errorf("reading the header stream: %w", err)
	}
	return &headerReader{dec: dec, br: bufio.NewReaderSize(dec, 64<<10)}, nil
}

func (h *headerReader) close() { h.dec.Close() }

// next returns a record's two numbers, each at most left, together too. The
// masked bytes are to be read from br then. io.EOF is the end of the stream.
func (h *headerReader) next(left int64) (content, masked int64, err error) {
	c, err := binary.ReadUvarint(h.br)
	if err != nil {
		return 0, 0, err // io.EOF only before the first byte
	}
	m, err := binary.ReadUvarint(h.br)
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, 0, err
	}
	if c > uint64(left) || m > uint64(left)-c { // left is never negative
		return 0, 0, corrupt("header stream goes beyond the diff by at least %d bytes", c+m-uint64(left))
	}
	if c == 0 && m == 0 {
		return 0, 0, corrupt("header stream has a record that says nothing")
	}
	return int64(c), int64(m), nil // at most left
}
