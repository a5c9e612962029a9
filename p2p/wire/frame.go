package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
)

// Limits, in bytes unless said otherwise. A message that breaks one is refused
// before it is read.
const (
	// MaxDigests is how many chunks one ChunkRequest may ask for.
	MaxDigests = 256
	// MaxHops bounds ChunkRequest.hops. Nodes stop forwarding long before.
	MaxHops = 255
	// MaxHave is how many layers one ImageRequest may name as known.
	MaxHave = 1024
	// MaxLayers is how many layers an ImageHeader may list.
	MaxLayers = 1024
	// MaxErrorText is the longest Error.text.
	MaxErrorText = 1 << 10
	// MaxRef is the longest image reference.
	MaxRef = 4 << 10
	// MaxPlatform is the longest of each of Platform's fields.
	MaxPlatform = 256
	// MaxCredential is the longest of each of Credential's fields.
	MaxCredential = 64 << 10
	// MaxIndexData is the longest IndexData.data.
	MaxIndexData = 1 << 20
	// MaxIndex is the longest index of one layer, and MaxImageIndex of all
	// layers of an image together.
	MaxIndex      = 128 << 20
	MaxImageIndex = 512 << 20

	// slack leaves room in each message for fields of later versions.
	slack = 4 << 10

	// MaxChunkRequest, MaxChunkFrame, MaxImageRequest and MaxImageFrame bound
	// the messages of these names.
	MaxChunkRequest = (MaxDigests+2)*32 + slack
	MaxChunkFrame   = blockdev.MaxChunk + slack
	MaxImageRequest = MaxRef + 3*MaxPlatform + 2*MaxCredential + 2*MaxHave*32 + slack
	MaxImageFrame   = MaxIndexData + slack
)

// Reader is what messages are read from: a *bufio.Reader, for example.
type Reader interface {
	io.Reader
	io.ByteReader
}

// AppendMessage appends m with its length in front to dst.
func AppendMessage(dst []byte, m proto.Message) ([]byte, error) {
	dst = binary.AppendUvarint(dst, uint64(proto.Size(m)))
	dst, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(dst, m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	return dst, nil
}

// ReadFrame reads one message of at most limit bytes and returns it without its
// length, in buf if that is large enough. The error is io.EOF only where r ends
// before the message begins; a length over limit, or one that is no varint,
// wraps blockdev.ErrCorrupt, and nothing is allocated for it.
func ReadFrame(r Reader, limit int, buf []byte) ([]byte, error) {
	n, err := readLength(r)
	if err != nil {
		return nil, err
	}
	if n > uint64(limit) {
		return nil, fmt.Errorf("message of %d bytes where at most %d are allowed: %w", n, limit, blockdev.ErrCorrupt)
	}
	if uint64(cap(buf)) < n {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := io.ReadFull(r, buf); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return buf, nil
}

// readLength reads a varint of at most five bytes, more than any limit needs.
func readLength(r io.ByteReader) (uint64, error) {
	var n uint64
	for shift := uint(0); shift < 5*7; shift += 7 {
		b, err := r.ReadByte()
		if err != nil {
			if errors.Is(err, io.EOF) && shift > 0 {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		n |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return n, nil
		}
	}
	return 0, fmt.Errorf("message length is not a varint of up to 5 bytes: %w", blockdev.ErrCorrupt)
}
