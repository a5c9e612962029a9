package fusefs

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
)

// The parts of the FUSE protocol (include/uapi/linux/fuse.h) that are handled
// here and not in go-fuse. All numbers are in host byte order.
const (
	opRead      = 15
	opInit      = 26
	opReaddir   = 28
	opInterrupt = 36

	inHeaderSize  = 40
	outHeaderSize = 16
	readInSize    = 40

	// minReadBuffer is FUSE_MIN_READ_BUFFER: read(2) on the descriptor fails
	// with EINVAL for less.
	minReadBuffer = 8192
	// initOutFlags and initOutFlags2 are where the two words of flags lie in the
	// answer to INIT, header included.
	initOutFlags  = outHeaderSize + 12
	initOutFlags2 = outHeaderSize + 32
	// initOutLimits is where max_background and congestion_threshold lie, 16 bits each.
	initOutLimits = outHeaderSize + 16
	// initOutMaxWrite is where fuse_init_out.max_write lies in the answer, in
	// bytes, header included.
	initOutMaxWrite = outHeaderSize + 20

	notifyResend = 7
)

// inHeader is struct fuse_in_header, less what is not used.
type inHeader struct {
	length uint32
	opcode uint32
	unique uint64
	node   uint64
}

// parseHeader reads the header of a request. ok is false if the request is
// shorter than it says, or than a header.
func parseHeader(b []byte) (h inHeader, ok bool) {
	if len(b) < inHeaderSize {
		return h, false
	}
	h = inHeader{
		length: binary.NativeEndian.Uint32(b),
		opcode: binary.NativeEndian.Uint32(b[4:]),
		unique: binary.NativeEndian.Uint64(b[8:]),
		node:   binary.NativeEndian.Uint64(b[16:]),
	}
	return h, int(h.length) == len(b)
}

// agreement is a FUSE_INIT request with its answer.
type agreement struct{ request, answer []byte }

// CheckInit says whether New will take init as Options.Init; an error wraps
// blockdev.ErrCorrupt.
func CheckInit(init []byte) error {
	_, err := parseAgreement(init)
	return err
}

// parseAgreement reads what Server.Init returned.
func parseAgreement(b []byte) (a agreement, err error) {
	damaged := func(what string) error {
		return fmt.Errorf("the saved FUSE_INIT is damaged (%s): %w", what, blockdev.ErrCorrupt)
	}
	if len(b) < inHeaderSize {
		return agreement{}, damaged("no request")
	}
	n := int64(binary.NativeEndian.Uint32(b))
	if n < inHeaderSize || n > int64(len(b)) {
		return agreement{}, damaged("length of the request")
	}
	a = agreement{b[:n], b[n:]}
	if h, ok := parseHeader(a.request); !ok || h.opcode != opInit {
		return agreement{}, damaged("request")
	}
	if len(a.answer) < initOutFlags2+4 || int(binary.NativeEndian.Uint32(a.answer)) != len(a.answer) {
		return agreement{}, damaged("answer")
	}
	if binary.NativeEndian.Uint32(a.answer[4:]) != 0 {
		return agreement{}, damaged("refused by its first server")
	}
	return a, nil
}

// refused is every capability that the answer does not have: none for no
// agreement.
func (a agreement) refused() uint64 {
	if a.answer == nil {
		return 0
	}
	flags := uint64(binary.NativeEndian.Uint32(a.answer[initOutFlags:]))
	flags |= uint64(binary.NativeEndian.Uint32(a.answer[initOutFlags2:])) << 32
	return ^flags
}

// background is max_background.
func (a agreement) background() int {
	return int(binary.NativeEndian.Uint16(a.answer[initOutLimits:]))
}

// same says whether answer agrees to the same protocol. The two limits may differ:
// they are the connection's, and Widen sets them.
func (a agreement) same(answer []byte) bool {
	return bytes.Equal(a.answer[:initOutLimits], answer[:initOutLimits]) && bytes.Equal(a.answer[initOutLimits+4:], answer[initOutLimits+4:])
}

// readIn is a READ request.
type readIn struct {
	unique uint64
	node   uint64
	handle uint64
	off    int64
	size   uint32
}

func parseRead(h inHeader, b []byte) (r readIn, ok bool) {
	if len(b) < inHeaderSize+readInSize {
		return r, false
	}
	r = readIn{
		unique: h.unique,
		node:   h.node,
		handle: binary.NativeEndian.Uint64(b[inHeaderSize:]),
		off:    int64(binary.NativeEndian.Uint64(b[inHeaderSize+8:])),
		size:   binary.NativeEndian.Uint32(b[inHeaderSize+16:]),
	}
	return r, r.off >= 0
}

// putOutHeader writes struct fuse_out_header for an answer with payload bytes.
func putOutHeader(b []byte, unique uint64, payload int, errno unix.Errno) {
	binary.NativeEndian.PutUint32(b, uint32(outHeaderSize+payload))
	binary.NativeEndian.PutUint32(b[4:], uint32(-int32(errno)))
	binary.NativeEndian.PutUint64(b[8:], unique)
}

func putUint32(b []byte, v uint32) { binary.NativeEndian.PutUint32(b, v) }
