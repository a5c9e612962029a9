package fusefs

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
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
