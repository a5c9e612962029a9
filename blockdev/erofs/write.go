package erofs

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
)

// Write writes the EROFS image of the tree below root to w: metadata in device
// 0 (what is written), the content of regular files on device 1, the masked
// diff of diffSize bytes. It reads the tree only; the same *Inode under several
// names is one inode with that many links.
//
// Errors name the path at fault and wrap blockdev.ErrUnsupported where EROFS or
// MaxSize has no room for the tree (a name of more than 255 bytes, another
// namespace of attributes, a sparse file with a chunk map that is too large),
// blockdev.ErrCorrupt where the tree contradicts itself or diffSize (names
// twice, extents that overlap or are not aligned). Nothing has been written
// then. Errors of w are returned as they are, wrapped.
func Write(w io.Writer, root *Inode, diffSize int64) error {
	return write(w, root, diffSize, blockBits)
}

// write is Write for any block size, so that tools that know only 4096 can
// judge the same code.
func write(w io.Writer, root *Inode, diffSize int64, blkBits uint8) error {
	img, err := newImage(root, diffSize, blkBits)
	if err != nil {
		return fmt.Errorf("erofs: %w", err)
	}
	// overlayfs tells its lower file systems apart by their UUIDs, and keeps
	// inode numbers over a copy-up only where there is one. It is a hash of the
	// image without it, in the form that RFC 9562 leaves to applications (8).
	h := sha256.New()
	if err := img.emit(h, [16]byte{}); err != nil {
		return fmt.Errorf("erofs: %w", err)
	}
	uuid := [16]byte(h.Sum(nil))
	uuid[6] = uuid[6]&0x0f | 0x80
	uuid[8] = uuid[8]&0x3f | 0x80
	if err := img.emit(w, uuid); err != nil {
		return fmt.Errorf("erofs: %w", err)
	}
	return nil
}

// emitter writes in order and knows where it is.
type emitter struct {
	w   *bufio.Writer
	pos int64
	buf []byte // reused
}

func (e *emitter) write(b []byte) error {
	n, err := e.w.Write(b)
	e.pos += int64(n)
	return err
}

var zeros [4096]byte

// padTo writes zeros up to pos.
func (e *emitter) padTo(pos int64) error {
	if pos < e.pos {
		return fmt.Errorf("internal error: at byte %d of the image, past %d", e.pos, pos)
	}
	for e.pos < pos {
		if err := e.write(zeros[:min(pos-e.pos, int64(len(zeros)))]); err != nil {
			return err
		}
	}
	return nil
}

func (img *image) emit(w io.Writer, uuid [16]byte) error {
	e := &emitter{w: bufio.NewWriterSize(w, 64<<10)}
	if err := img.emitSuper(e, uuid); err != nil {
		return err
	}
	for i := range img.nodes {
		if err := img.emitNode(e, &img.nodes[i]); err != nil {
			return err
		}
	}
	if err := e.padTo(img.sharedPos); err != nil {
		return err
	}
	for i := range img.shared.order {
		e.buf = appendXattr(e.buf[:0], &img.shared.order[i].x)
		if err := e.write(e.buf); err != nil {
			return err
		}
	}
	for i := range img.nodes {
		if err := img.emitData(e, &img.nodes[i]); err != nil {
			return err
		}
	}
	if err := e.padTo(img.total); err != nil {
		return err
	}
	return e.w.Flush()
}

func (img *image) emitSuper(e *emitter, uuid [16]byte) error {
	if err := e.padTo(superOffset); err != nil {
		return err
	}
	sb := superBlock{
		blkBits:   img.blkBits,
		rootNID:   uint16(img.nodes[0].pos / inodeUnit), // the first inode, in the first blocks
		inodes:    uint64(len(img.nodes)),
		buildSec:  img.buildSec,
		buildNsec: img.buildNsec,
		blocks:    uint32(img.total >> img.blkBits),     // fits: at most MaxSize
		xattrBlk:  uint32(img.sharedPos >> img.blkBits), // fits likewise
		uuid:      uuid,
		devBlocks: uint32((img.diffSize + img.blk - 1) >> img.blkBits), // at most MaxDiffSize
	}
	// The checksum covers the rest of the block, or one whole block where
	// blocks are no larger than superOffset.
	n := img.blk
	if n > superOffset {
		n -= superOffset
	}
	b := make([]byte, n)
	sb.encode(b)
	return e.write(b)
}

// emitNode writes an inode and what follows it: attributes, then the tail or
// the chunk map.
func (img *image) emitNode(e *emitter, n *node) error {
	if err := e.padTo(n.pos); err != nil {
		return err
	}
	f := inodeFields{compact: n.compact, layout: n.layout, nlink: n.nlink, size: n.size}
	if n.xsize > 0 {
		f.xcount = uint16((n.xsize-sizeXattrHead)/4 + 1) // at most maxXattrArea
	}
	switch {
	case n.layout == layoutChunks:
		f.u = uint32(n.chunkBits) | chunkWithIndexes
	case n.typ() == modeChar || n.typ() == modeBlock:
		f.u = n.in.Rdev
	default:
		f.u = uint32(n.data >> img.blkBits) // inside the image
	}
	var b [sizeExtended]byte
	e.buf = append(e.buf[:0], b[:f.encode(&b, n.in)]...)
	e.buf = img.shared.appendBody(e.buf, n.in.Xattrs)
	if n.layout == layoutInline {
		e.buf = img.appendTail(e.buf, n)
	}
	if err := e.write(e.buf); err != nil {
		return err
	}
	if n.layout == layoutChunks {
		if err := e.padTo(alignUp(e.pos, sizeChunk)); err != nil {
			return err
		}
		return img.emitChunks(e, n)
	}
	return nil
}

func (img *image) appendTail(b []byte, n *node) []byte {
	if n.typ() != modeDir {
		return append(b, n.in.Inline[n.size-int64(n.tail):]...)
	}
	ents := n.ents
	for {
		count, _ := nextBlock(ents, img.blk)
		if count == len(ents) {
			return img.appendDirBlock(b, ents)
		}
		ents = ents[count:]
	}
}

// emitChunks writes the chunk map. No boundary falls into a chunk, so the
// extent that holds a chunk's first byte says all about it.
func (img *image) emitChunks(e *emitter, n *node) error {
	ext := n.in.Extents
	le := binary.LittleEndian
	e.buf = e.buf[:0]
	for k := range n.chunks {
		off := k << (img.blkBits + n.chunkBits)
		for len(ext) > 0 && ext[0].Offset+ext[0].Length <= off {
			ext = ext[1:]
		}
		device, addr := uint16(0), uint32(nullAddress)
		if len(ext) > 0 && ext[0].Offset <= off {
			device, addr = device1, uint32((ext[0].DiffOffset+off-ext[0].Offset)>>img.blkBits) // fits: at most MaxDiffSize
		}
		e.buf = le.AppendUint32(le.AppendUint16(append(e.buf, 0, 0), device), addr)
		if len(e.buf) >= 4096 {
			if err := e.write(e.buf); err != nil {
				return err
			}
			e.buf = e.buf[:0]
		}
	}
	return e.write(e.buf)
}

// emitData writes an inode's blocks in the data area.
func (img *image) emitData(e *emitter, n *node) error {
	if n.dataLen == 0 {
		return nil
	}
	if err := e.padTo(n.data); err != nil {
		return err
	}
	if n.typ() != modeDir {
		return e.write(n.in.Inline[:n.dataLen])
	}
	for ents, end := n.ents, n.data+n.dataLen; e.pos < end; {
		count, _ := nextBlock(ents, img.blk)
		e.buf = img.appendDirBlock(e.buf[:0], ents[:count])
		if err := e.write(e.buf); err != nil {
			return err
		}
		ents = ents[count:]
		if len(ents) > 0 {
			if err := e.padTo(alignUp(e.pos, img.blk)); err != nil {
				return err
			}
		}
	}
	return nil
}
