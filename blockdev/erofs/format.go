package erofs

import (
	"encoding/binary"
	"hash/crc32"
)

// On-disk constants, from Linux fs/erofs/erofs_fs.h. All integers are little
// endian.
const (
	blockBits = 9
	blockSize = 1 << blockBits

	superOffset = 1024
	superSize   = 128
	superMagic  = 0xE0F5E1E2
	deviceSize  = 128 // one slot of the device table

	featureCompatChecksum  = 0x1
	featureCompatMtime     = 0x2
	featureIncompatChunked = 0x4
	featureIncompatDevices = 0x8

	inodeUnit     = 32 // bytes a nid counts
	sizeCompact   = 32
	sizeExtended  = 64
	sizeDirent    = 12
	sizeXattrHead = 12
	sizeXattr     = 4
	sizeChunk     = 8

	layoutPlain  = 0 // content in blocks of this image
	layoutInline = 2 // the same, but its last block follows the inode
	layoutChunks = 4 // content in chunks, each with a device and an address

	chunkBitsMax     = 31   // log2 of the largest chunk, in blocks
	chunkWithIndexes = 0x20 // 8-byte entries, which name a device
	nullAddress      = 0xFFFFFFFF
	device1          = 1
)

// fileType maps st_mode to the type in a directory entry.
func fileType(mode uint32) byte {
	switch mode & modeType {
	case modeRegular:
		return 1
	case modeDir:
		return 2
	case modeChar:
		return 3
	case modeBlock:
		return 4
	case modeFIFO:
		return 5
	case modeSocket:
		return 6
	case modeSymlink:
		return 7
	}
	return 0
}

// superBlock holds what differs from image to image.
type superBlock struct {
	blkBits   uint8
	rootNID   uint16
	inodes    uint64
	buildSec  int64
	buildNsec uint32
	blocks    uint32 // of this image
	xattrBlk  uint32
	uuid      [16]byte
	devBlocks uint32
}

// encode fills b, which starts at superOffset and ends with the block that the
// checksum covers; it has room for superblock and device table at least.
func (s *superBlock) encode(b []byte) {
	le := binary.LittleEndian
	clear(b)
	le.PutUint32(b[0:], superMagic)
	le.PutUint32(b[8:], featureCompatChecksum|featureCompatMtime)
	b[12] = s.blkBits
	le.PutUint16(b[14:], s.rootNID)
	le.PutUint64(b[16:], s.inodes)
	le.PutUint64(b[24:], uint64(s.buildSec)) // two's complement, as the kernel reads it
	le.PutUint32(b[32:], s.buildNsec)
	le.PutUint32(b[36:], s.blocks)
	// 40: meta_blkaddr stays 0, so a nid is the inode's offset in the image / 32.
	le.PutUint32(b[44:], s.xattrBlk)
	copy(b[48:64], s.uuid[:])
	le.PutUint32(b[80:], featureIncompatChunked|featureIncompatDevices)
	le.PutUint16(b[86:], 1) // extra devices
	le.PutUint16(b[88:], (superOffset+superSize)/deviceSize)
	// The device slot: no tag (the mount option names the file) and no address
	// in a flat space of all devices.
	le.PutUint32(b[superSize+64:], s.devBlocks)
	// The kernel's crc32c starts with all bits set and is not inverted at the
	// end, unlike hash/crc32's.
	le.PutUint32(b[4:], ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// inodeFields is one on-disk inode, in either form.
type inodeFields struct {
	compact bool
	layout  uint8
	xcount  uint16 // i_xattr_icount
	nlink   uint32
	size    int64
	u       uint32 // block address, device number or chunk format
}

// encode fills b and returns the inode's length in bytes. i_ino stays 0: it is
// for systems with 32-bit inode numbers, and the kernel derives that from the nid.
func (f *inodeFields) encode(b *[sizeExtended]byte, in *Inode) int {
	le := binary.LittleEndian
	clear(b[:])
	le.PutUint16(b[2:], f.xcount)
	le.PutUint16(b[4:], uint16(in.Mode)) // Inode.check: type and permissions fit
	if f.compact {
		le.PutUint16(b[0:], uint16(f.layout)<<1)
		le.PutUint16(b[6:], uint16(f.nlink)) // compact only if all of these fit
		le.PutUint32(b[8:], uint32(f.size))  // fits likewise
		le.PutUint32(b[16:], f.u)
		le.PutUint16(b[24:], uint16(in.UID)) // fits likewise
		le.PutUint16(b[26:], uint16(in.GID)) // fits likewise
		return sizeCompact
	}
	le.PutUint16(b[0:], uint16(f.layout)<<1|1)
	le.PutUint64(b[8:], uint64(f.size)) // never negative
	le.PutUint32(b[16:], f.u)
	le.PutUint32(b[24:], in.UID)
	le.PutUint32(b[28:], in.GID)
	le.PutUint64(b[32:], uint64(in.MtimeSec)) // two's complement, as the kernel reads it
	le.PutUint32(b[40:], in.MtimeNsec)
	le.PutUint32(b[44:], f.nlink)
	return sizeExtended
}
