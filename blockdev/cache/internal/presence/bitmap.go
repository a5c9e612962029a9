package presence

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/shoalfs/shoal/blockdev"
)

// The bitmap file, version 1. Numbers are little-endian.
//
// Header, 4096 bytes; what is not named here is zero:
//
//	  0   8  magic "SHOALBM" and a zero byte
//	  8   4  version, 1
//	 12   4  flags: 1 = complete
//	 16  32  DiffID
//	 48  32  SHA-256 of the encoded index, as it lies beside the bitmap
//	 80  16  first 16 bytes of the SHA-256 of the kernel's boot id, during
//	         which the file was written
//	 96   8  bytes in the masked diff
//	104   4  chunks, n
//	480  32  SHA-256 of the bytes 0 to 479
//
// Then ceil(n/32) records of 16 bytes, record g for the chunks 32g to 32g+31,
// bit i of a word for chunk 32g+i:
//
//	 0   4  present
//	 4   4  synced
//	 8   4  suspect
//	12   4  CRC-32C of the DiffID, g as 4 bytes, and the bytes 0 to 11
//
// A record of zeros says that nothing is known of its chunks, which is how a new
// file begins. The file has its full length from the start, and is written in
// place, records one by one or several at once. The reader believes
//
//   - nothing, if the header does not check out: every chunk is suspect;
//   - nothing of a record that does not check out: its chunks are suspect;
//   - present, if the boot id is that of the running kernel: the page cache has
//     all that was written since;
//   - only present and synced, if it is not; the other present ones are suspect.
const (
	bitmapMagic   = "SHOALBM\x00"
	bitmapVersion = 1
	HeaderSize    = 4096
	headerSum     = 480
	recordSize    = 16

	flagComplete = 1
)

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// Header is the first 4096 bytes of a bitmap file.
type Header struct {
	Complete bool
	DiffID   blockdev.Digest
	Index    blockdev.Digest // SHA-256 of the encoded index
	Boot     [16]byte
	DiffSize int64
	Chunks   uint32
}

// HeaderOf is for a diff whose encoded index has the SHA-256 sum, written during boot.
func HeaderOf(ix *blockdev.Index, sum blockdev.Digest, boot [16]byte) Header {
	return Header{DiffID: ix.DiffID, Index: sum, Boot: boot, DiffSize: ix.DiffSize, Chunks: uint32(len(ix.Chunks))}
}

// HashBoot is what a header says of the kernel's boot id.
func HashBoot(id string) (b [16]byte) {
	s := sha256.Sum256([]byte(id))
	copy(b[:], s[:])
	return b
}

// Encode returns the header's HeaderSize bytes.
func (h *Header) Encode() []byte {
	b := make([]byte, HeaderSize)
	copy(b, bitmapMagic)
	binary.LittleEndian.PutUint32(b[8:], bitmapVersion)
	if h.Complete {
		binary.LittleEndian.PutUint32(b[12:], flagComplete)
	}
	copy(b[16:], h.DiffID[:])
	copy(b[48:], h.Index[:])
	copy(b[80:], h.Boot[:])
	binary.LittleEndian.PutUint64(b[96:], uint64(h.DiffSize))
	binary.LittleEndian.PutUint32(b[104:], h.Chunks)
	sum := sha256.Sum256(b[:headerSum])
	copy(b[headerSum:], sum[:])
	return b
}

// DecodeHeader reads a header; any damage is an error that wraps ErrCorrupt.
func DecodeHeader(b []byte) (h Header, err error) {
	if len(b) < HeaderSize {
		return h, fmt.Errorf("bitmap of %d bytes is shorter than its header: %w", len(b), blockdev.ErrCorrupt)
	}
	if string(b[:8]) != bitmapMagic {
		return h, fmt.Errorf("bitmap begins with %q: %w", b[:8], blockdev.ErrCorrupt)
	}
	if sum := sha256.Sum256(b[:headerSum]); !bytes.Equal(sum[:], b[headerSum:headerSum+len(sum)]) {
		return h, fmt.Errorf("bitmap header does not match its checksum: %w", blockdev.ErrCorrupt)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != bitmapVersion {
		return h, fmt.Errorf("bitmap version %d, this program reads %d: %w", v, bitmapVersion, blockdev.ErrCorrupt)
	}
	h.Complete = binary.LittleEndian.Uint32(b[12:])&flagComplete != 0
	copy(h.DiffID[:], b[16:])
	copy(h.Index[:], b[48:])
	copy(h.Boot[:], b[80:])
	h.DiffSize = int64(binary.LittleEndian.Uint64(b[96:]))
	h.Chunks = binary.LittleEndian.Uint32(b[104:])
	return h, nil
}

// ErrIndex: the bitmap was made for another index of the diff.
var ErrIndex = fmt.Errorf("index is not the one that the bitmap was made for: %w", blockdev.ErrCorrupt)

// Read reads the header of a whole bitmap file that should have this one, whatever it says
// of Complete and Boot. The error is ErrIndex, or wraps blockdev.ErrCorrupt.
func Read(file []byte, want Header) (Header, error) {
	h, err := DecodeHeader(file)
	switch {
	case err != nil:
		return h, err
	case h.DiffID != want.DiffID:
		return h, fmt.Errorf("bitmap is that of diff %v: %w", h.DiffID, blockdev.ErrCorrupt)
	case h.Index != want.Index:
		return h, ErrIndex
	case h.Chunks != want.Chunks || h.DiffSize != want.DiffSize || int64(len(file)) != FileSize(int(want.Chunks)):
		return h, fmt.Errorf("bitmap is of another size: %w", blockdev.ErrCorrupt)
	}
	return h, nil
}

// Damaged counts those of a file's records that do not match their checksums.
func Damaged(id blockdev.Digest, records []byte) (damaged int) {
	codec := newRecordCodec(id)
	for g := range len(records) / recordSize {
		if _, ok := codec.get(records[g*recordSize:], g); !ok {
			damaged++
		}
	}
	return damaged
}

// FileSize is the length in bytes of the file for n chunks.
func FileSize(n int) int64 { return HeaderSize + int64(records(n))*recordSize }

type record struct{ present, synced, suspect uint32 }

// recordCodec writes and reads the records of one diff.
type recordCodec struct {
	tab  *crc32.Table
	seed uint32 // CRC of the DiffID
}

func newRecordCodec(id blockdev.Digest) recordCodec {
	tab := castagnoli()
	return recordCodec{tab, crc32.Checksum(id[:], tab)}
}

func (c recordCodec) sum(g int, b []byte) uint32 {
	var num [4]byte
	binary.LittleEndian.PutUint32(num[:], uint32(g))
	return crc32.Update(crc32.Update(c.seed, c.tab, num[:]), c.tab, b[:12])
}

func (c recordCodec) put(b []byte, g int, r record) {
	binary.LittleEndian.PutUint32(b, r.present)
	binary.LittleEndian.PutUint32(b[4:], r.synced)
	binary.LittleEndian.PutUint32(b[8:], r.suspect)
	binary.LittleEndian.PutUint32(b[12:], c.sum(g, b))
}

// get reads a record; ok is false if it is damaged.
func (c recordCodec) get(b []byte, g int) (r record, ok bool) {
	if sum := binary.LittleEndian.Uint32(b[12:]); sum != c.sum(g, b) {
		return record{}, sum == 0 && [12]byte(b) == [12]byte{}
	}
	return record{
		present: binary.LittleEndian.Uint32(b),
		synced:  binary.LittleEndian.Uint32(b[4:]),
		suspect: binary.LittleEndian.Uint32(b[8:]),
	}, true
}
