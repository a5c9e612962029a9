package wire

import (
	"encoding/binary"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
)

// Chunk frames are the data path, so they are encoded and decoded by hand: a
// generated message would copy the chunk again at either end. The bytes are
// those of message ChunkFrame; tests compare with the generated code.

// Field numbers of ChunkFrame.
const (
	fieldIndex  = 1
	fieldData   = 2
	fieldZstd   = 3
	fieldLength = 4
	fieldError  = 5
	fieldEnd    = 6
)

// Frame is a ChunkFrame that has passed ParseChunkFrame. Exactly one of these
// holds: End is set; Err is set; Data is a chunk. (End and Err together: the
// request as a whole failed.)
type Frame struct {
	Index  int    // position in the request
	Data   []byte // 1 to blockdev.MaxChunk bytes, within the buffer that was parsed
	Zstd   bool   // Data is one zstd frame
	Length int    // bytes of the chunk before compression, 1 to blockdev.MaxChunk
	Err    *Error // code and text are as the sender wrote them; see Error.Err
	End    bool
}

// AppendChunkHeader appends all of a ChunkFrame, and its length in front, but
// the n bytes of data themselves, which must follow. length is the chunk's
// before compression.
func AppendChunkHeader(dst []byte, index int, zstd bool, length, n int) []byte {
	size := protowire.SizeTag(fieldLength) + protowire.SizeVarint(uint64(length)) +
		protowire.SizeTag(fieldData) + protowire.SizeBytes(n)
	if index != 0 {
		size += protowire.SizeTag(fieldIndex) + protowire.SizeVarint(uint64(index))
	}
	if zstd {
		size += protowire.SizeTag(fieldZstd) + 1
	}
	dst = binary.AppendUvarint(dst, uint64(size))
	if index != 0 {
		dst = protowire.AppendTag(dst, fieldIndex, protowire.VarintType)
		dst = protowire.AppendVarint(dst, uint64(index))
	}
	if zstd {
		dst = protowire.AppendTag(dst, fieldZstd, protowire.VarintType)
		dst = append(dst, 1)
	}
	dst = protowire.AppendTag(dst, fieldLength, protowire.VarintType)
	dst = protowire.AppendVarint(dst, uint64(length))
	dst = protowire.AppendTag(dst, fieldData, protowire.BytesType)
	return protowire.AppendVarint(dst, uint64(n))
}

// ParseChunkFrame reads a ChunkFrame from b, the message without its length.
// f.Data points into b. Errors wrap blockdev.ErrCorrupt.
func ParseChunkFrame(b []byte, f *Frame) error {
	*f = Frame{}
	var index, length uint64
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return corrupt("chunk frame", protowire.ParseError(n))
		}
		if num > protowire.MaxValidNumber {
			return corrupt("chunk frame", fmt.Errorf("field number %d", num))
		}
		b = b[n:]
		switch {
		case num == fieldData && typ == protowire.BytesType:
			f.Data, n = protowire.ConsumeBytes(b)
		case num == fieldError && typ == protowire.BytesType:
			var e []byte
			if e, n = protowire.ConsumeBytes(b); n >= 0 {
				if f.Err == nil {
					f.Err = &Error{}
				}
				if err := (proto.UnmarshalOptions{Merge: true}).Unmarshal(e, f.Err); err != nil {
					return corrupt("chunk frame", err)
				}
			}
		case typ == protowire.VarintType:
			var v uint64
			v, n = protowire.ConsumeVarint(b)
			switch num {
			case fieldIndex:
				index = v & 0xffffffff // as generated code does for a uint32
			case fieldLength:
				length = v & 0xffffffff
			case fieldZstd:
				f.Zstd = v != 0
			case fieldEnd:
				f.End = v != 0
			}
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return corrupt("chunk frame", protowire.ParseError(n))
		}
		b = b[n:]
	}
	switch {
	case f.End || f.Err != nil:
		if len(f.Data) > 0 || f.Zstd || length != 0 {
			return corrupt("chunk frame", fmt.Errorf("both an end or error and data"))
		}
		f.Data = nil
	case len(f.Data) == 0 || len(f.Data) > blockdev.MaxChunk:
		return corrupt("chunk frame", fmt.Errorf("%d bytes of data, not 1 to %d", len(f.Data), blockdev.MaxChunk))
	case length == 0 || length > blockdev.MaxChunk:
		return corrupt("chunk frame", fmt.Errorf("chunk length %d, not 1 to %d", length, blockdev.MaxChunk))
	case !f.Zstd && uint64(len(f.Data)) != length:
		return corrupt("chunk frame", fmt.Errorf("%d bytes of data for a chunk of %d", len(f.Data), length))
	}
	if index >= MaxDigests {
		return corrupt("chunk frame", fmt.Errorf("index %d, the largest is %d", index, MaxDigests-1))
	}
	f.Index, f.Length = int(index), int(length)
	return nil
}

func corrupt(what string, err error) error {
	return fmt.Errorf("%s: %w: %w", what, blockdev.ErrCorrupt, err)
}
