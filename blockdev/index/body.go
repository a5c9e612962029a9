package index

import (
	"encoding/binary"

	"github.com/klauspost/compress/zstd"

	"github.com/shoalfs/shoal/blockdev"
)

// window is the zstd window of frames that Encode makes, and the largest that
// Decode allows, in bytes.
const window = 8 << 20

// appendBody appends what is compressed: metadata, lengths of chunks, lengths of
// pieces, implied directories.
func (h *header) appendBody(b []byte, ix *blockdev.Index) []byte {
	b = append(b, ix.Meta...)
	b = appendLengths(b, len(ix.Chunks), func(i int) uint32 { return ix.Chunks[i].Length })
	b = appendLengths(b, len(ix.Headers), func(i int) uint32 { return ix.Headers[i].Length })
	for _, p := range ix.Implied {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(p)))
		b = append(b, p...)
	}
	return b
}

// appendLengths appends n lengths less 1, as three planes: all low bytes, all
// middle bytes, all high bytes. The low ones are noise; apart, they do not hide
// from the compressor that the high ones are nearly all the same.
func appendLengths(b []byte, n int, length func(int) uint32) []byte {
	for shift := 0; shift < 24; shift += 8 {
		for i := range n {
			b = append(b, byte((length(i)-1)>>shift))
		}
	}
	return b
}

// lengthAt reads length i of the n whose planes b starts with. A value above
// MaxChunk is possible; check refuses it.
func lengthAt(b []byte, n, i int) uint32 {
	return (uint32(b[i]) | uint32(b[n+i])<<8 | uint32(b[2*n+i])<<16) + 1
}

// decodeImplied wants n paths, and nothing after them.
func decodeImplied(b []byte, n int) ([]string, error) {
	if 2*n > len(b) {
		return nil, corrupt("%d implied directories in %d bytes", n, len(b))
	}
	var paths []string
	if n > 0 {
		paths = make([]string, 0, n)
	}
	for range n {
		if len(b) < 2 {
			return nil, corrupt("implied directories end early")
		}
		size := int(binary.LittleEndian.Uint16(b))
		if b = b[2:]; size > len(b) {
			return nil, corrupt("implied directory of %d bytes where %d are left", size, len(b))
		}
		paths = append(paths, string(b[:size]))
		b = b[size:]
	}
	if len(b) > 0 {
		return nil, corrupt("%d bytes after the last implied directory", len(b))
	}
	return paths, nil
}

// smallBody is where the better compression level starts, in bytes: the tables
// that it makes first take ten times as long as a small body itself. The best
// level saves 5 % more of the metadata of real layers, but takes three times as
// long, and on awkward input 20 times.
const smallBody = 128 << 10

// compress appends one zstd frame; an empty body has none.
func compress(dst, body []byte) ([]byte, error) {
	if len(body) == 0 {
		return dst, nil
	}
	level := zstd.SpeedBetterCompression
	if len(body) < smallBody {
		level = zstd.SpeedDefault
	}
	enc, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(level),
		zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(window),
		// Short frames say how long their content is only if they are single segments.
		zstd.WithSingleSegment(len(body) <= window),
		zstd.WithEncoderCRC(false)) // the header's checksum is stronger
	if err != nil {
		return nil, err
	}
	frame := enc.EncodeAll(body, dst)
	if err := enc.Close(); err != nil {
		return nil, err
	}
	return frame, nil
}

// decompress wants one frame, and all of it, that holds size bytes.
func decompress(frame []byte, size int) ([]byte, error) {
	if size == 0 {
		if len(frame) > 0 {
			return nil, corrupt("%d bytes of compressed metadata for nothing", len(frame))
		}
		return nil, nil
	}
	if err := checkFrame(frame, size); err != nil {
		return nil, err
	}
	dec, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(uint64(max(size, zstd.MinWindowSize))),
		zstd.WithDecoderMaxWindow(window))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	body, err := dec.DecodeAll(frame, nil)
	if err != nil {
		return nil, corrupt("compressed metadata: %w", err)
	}
	if len(body) != size {
		return nil, corrupt("%d bytes of metadata where the header announces %d", len(body), size)
	}
	return body, nil
}

// maxBlock is what one zstd block can hold, in bytes (RFC 8878, section 3.1.1.2.3).
const maxBlock = 128 << 10

// checkFrame walks the frame's blocks (RFC 8878, section 3.1.1). The decoder
// would take several frames, and such as hold nothing, for one; and it makes room
// for what the frame's header claims before it has seen the blocks, so blocks
// that cannot hold that much are refused here.
func checkFrame(frame []byte, size int) error {
	var h zstd.Header
	rest, err := h.DecodeAndStrip(frame)
	if err != nil {
		return corrupt("compressed metadata: %w", err)
	}
	if h.Skippable || h.DictionaryID != 0 || h.HasCheckSum || !h.HasFCS || h.FrameContentSize != uint64(size) {
		return corrupt("compressed metadata is not a plain zstd frame of %d bytes", size)
	}
	room := 0
	for last := false; !last; {
		if len(rest) < 3 {
			return corrupt("compressed metadata ends early")
		}
		v := uint32(rest[0]) | uint32(rest[1])<<8 | uint32(rest[2])<<16
		last = v&1 != 0
		n := int(v >> 3)
		if n > maxBlock {
			return corrupt("compressed metadata has a block of %d bytes", n)
		}
		switch v >> 1 & 3 {
		case 0: // as it is
			room += n
		case 1: // one byte, n times
			room += n
			n = 1
		case 2: // compressed
			room += maxBlock
		case 3:
			return corrupt("compressed metadata has a block of a reserved type")
		}
		if rest = rest[3:]; len(rest) < n {
			return corrupt("compressed metadata ends early")
		}
		rest = rest[n:]
	}
	if len(rest) > 0 {
		return corrupt("%d bytes after the compressed metadata", len(rest))
	}
	if room < size {
		return corrupt("compressed metadata announces %d bytes and can hold %d", size, room)
	}
	return nil
}
