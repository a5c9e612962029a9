package erofs

import "encoding/binary"

// nextBlock returns how many of ents fill a directory block, and the bytes they
// take: all the 12-byte entries first, then the names.
func nextBlock(ents []dirent, blk int64) (count int, used int64) {
	for count < len(ents) {
		n := int64(sizeDirent + len(ents[count].name))
		if used+n > blk {
			break
		}
		used += n
		count++
	}
	return count, used
}

// dirSize is a directory's i_size in bytes: full blocks, and what is used of the
// last one.
func dirSize(ents []dirent, blk int64) (size int64) {
	for len(ents) > 0 {
		count, used := nextBlock(ents, blk)
		if ents = ents[count:]; len(ents) == 0 {
			return size + used
		}
		size += blk
	}
	return size
}

// appendDirBlock appends one block without its padding. The name of an entry
// ends where the next one's starts; the last one's at the end of the block or
// at its first NUL.
func (img *image) appendDirBlock(b []byte, ents []dirent) []byte {
	nameOff := len(ents) * sizeDirent
	for _, e := range ents {
		n := &img.nodes[e.node]
		b = binary.LittleEndian.AppendUint64(b, uint64(n.pos/inodeUnit)) // positive
		b = binary.LittleEndian.AppendUint16(b, uint16(nameOff))         // inside a block
		b = append(b, fileType(n.in.Mode), 0)
		nameOff += len(e.name)
	}
	for _, e := range ents {
		b = append(b, e.name...)
	}
	return b
}
