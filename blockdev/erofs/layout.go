package erofs

import "math/bits"

// floorChunk is the smallest chunk of a file that one chunk could hold (1 MiB
// in blocks of 512). It is there for compression: nearly all files of a layer
// get the same chunk format.
const floorChunk = 11

func alignUp(n, to int64) int64 { return (n + to - 1) &^ (to - 1) }

// place gives every inode and block its place: superblock and device table,
// inodes with what follows them, shared attributes, data blocks.
func (img *image) place() error {
	pos := alignUp(superOffset+superSize+deviceSize, img.blk)
	for i := range img.nodes {
		n := &img.nodes[i]
		xsize, err := img.shared.bodySize(n.in.Xattrs)
		if err != nil {
			return err
		}
		n.xsize = int32(xsize) // at most maxXattrArea
		n.layout = layoutPlain
		switch n.typ() {
		case modeDir:
			n.size = dirSize(n.ents, img.blk)
		case modeSymlink:
			n.size = int64(len(n.in.Inline))
		case modeRegular:
			n.size = n.in.Size
		}
		n.compact = n.in.MtimeSec == img.buildSec && n.in.MtimeNsec == img.buildNsec &&
			n.in.UID>>16 == 0 && n.in.GID>>16 == 0 && n.nlink>>16 == 0 && n.size>>32 == 0
		n.pos = alignUp(pos, inodeUnit)
		if n.typ() == modeRegular && len(n.in.Inline) == 0 && n.size > 0 {
			n.layout = layoutChunks
			n.chunkBits, n.chunks = chunking(n.in, img.blkBits)
			// The kernel looks for the map at the next multiple of its unit.
			pos = alignUp(n.pos+n.isize()+xsize, sizeChunk) + sizeChunk*n.chunks
		} else {
			img.placeTail(n)
			pos = n.pos + n.isize() + xsize + int64(n.tail)
		}
		if err := checkTotal(pos); err != nil {
			return err
		}
	}
	pos = alignUp(pos, img.blk)
	img.sharedPos = pos
	pos = alignUp(pos+img.shared.size, img.blk)
	for i := range img.nodes {
		n := &img.nodes[i]
		if n.layout == layoutChunks {
			continue
		}
		if n.dataLen = n.size - int64(n.tail); n.dataLen > 0 {
			n.data = pos
			pos = alignUp(pos+n.dataLen, img.blk)
		}
		if err := checkTotal(pos); err != nil {
			return err
		}
	}
	img.total = pos
	return nil
}

func checkTotal(pos int64) error {
	if pos > MaxSize {
		return unsupported("metadata of more than %d bytes", MaxSize)
	}
	return nil
}

// placeTail puts the last, partial block of a directory, symlink or inline file
// right behind its inode, moving the inode on if need be. Readers want the tail
// in one block. Symlinks are held to the rule of older kernels: the target ends
// in the block in which the inode ends, so attributes must not push it out.
func (img *image) placeTail(n *node) {
	tail := n.size % img.blk
	if tail == 0 {
		return
	}
	for p := n.pos; p < n.pos+img.blk; p += inodeUnit {
		start := (p + n.isize() + int64(n.xsize)) % img.blk
		fits := start+tail <= img.blk
		if n.typ() == modeSymlink {
			fits = (p+n.isize()-1)%img.blk+1+int64(n.xsize)+tail <= img.blk
		}
		if fits {
			n.pos, n.tail, n.layout = p, int32(tail), layoutInline // less than a block
			return
		}
	}
}

// chunking chooses the largest chunk that no boundary between data, hole and
// discontiguous data falls into, and returns log2 of its size in blocks and the
// number of chunks.
func chunking(in *Inode, blkBits uint8) (chunkBits uint8, chunks int64) {
	var bounds uint64 // every boundary's bits, in blocks
	var end, diffEnd int64
	for _, e := range in.Extents {
		if e.Offset != end || e.DiffOffset != diffEnd {
			bounds |= uint64(e.Offset)>>blkBits | uint64(end)>>blkBits // never negative
		}
		end, diffEnd = e.Offset+e.Length, e.DiffOffset+e.Length
	}
	if end < in.Size {
		bounds |= uint64(end) >> blkBits // never negative
	}
	if bounds != 0 {
		chunkBits = uint8(min(bits.TrailingZeros64(bounds), chunkBitsMax)) // at most 31
	} else {
		blocks := uint64(in.Size-1) >> blkBits                                    // Size > 0
		chunkBits = uint8(min(max(bits.Len64(blocks), floorChunk), chunkBitsMax)) // at most 31
	}
	return chunkBits, (in.Size-1)>>(blkBits+chunkBits) + 1
}
