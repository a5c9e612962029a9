package layer

import (
	"archive/tar"
	"bytes"
	"strconv"
	"strings"

	"github.com/shoalfs/shoal/blockdev/erofs"
)

// part is a run of data in a sparse file. The runs follow each other in the
// diff without gaps.
type part struct {
	offset int64 // in the file, bytes
	length int64
}

// Records of GNU's sparse formats 0.0, 0.1 and 1.0 for PAX; archive/tar turns
// 0.0 into 0.1. See "Storing Sparse Files" in the manual of GNU tar.
const (
	paxSize        = "size"
	paxSparseMajor = "GNU.sparse.major"
	paxSparseMinor = "GNU.sparse.minor"
	paxSparseMap   = "GNU.sparse.map"
)

// dataOf says how many bytes of data follow the headers of an entry, and, of a
// sparse file (parts is not nil), which parts of the file they are. head is the
// raw headers, with the sparse map where it has blocks of its own. archive/tar
// has checked the map against the file's size, but keeps it to itself.
func dataOf(hdr *tar.Header, head []byte) (parts []part, size int64, err error) {
	switch hdr.Typeflag {
	case tar.TypeLink, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeDir, tar.TypeFifo, tar.TypeXGlobalHeader:
		return nil, 0, nil // whatever the size says
	}
	kind := sparseKind(hdr)
	if kind == "" {
		return nil, hdr.Size, nil
	}
	main := mainHeader(head)
	if main == nil {
		return nil, 0, corrupt("sparse file without a header")
	}
	// The size that counts the data, not the holes.
	if v := hdr.PAXRecords[paxSize]; v != "" {
		size, err = strconv.ParseInt(v, 10, 64)
	} else {
		size, err = number(main[124:136])
	}
	if err != nil {
		return nil, 0, corrupt("size of a sparse file: %w", err)
	}
	switch kind {
	case "old":
		return nil, size, nil // the tree takes no such file; a whiteout may be one
	case "0":
		parts, err = decimals(strings.Split(hdr.PAXRecords[paxSparseMap], ","))
	case "1":
		blocks := main[tarBlock:]
		size -= int64(len(blocks)) // the map is part of the data
		// The first number says how many pairs follow.
		lines := strings.Split(string(blocks), "\n")
		n, cerr := strconv.Atoi(lines[0])
		if cerr != nil || n < 0 || n > (len(lines)-2)/2 {
			return nil, 0, corrupt("sparse map does not say how long it is")
		}
		parts, err = decimals(lines[1 : 1+2*n])
	}
	if err != nil {
		return nil, 0, corrupt("sparse map: %w", err)
	}
	left := size
	for _, p := range parts {
		if p.offset < 0 || p.length < 0 || p.length > left || p.offset > hdr.Size-p.length {
			return nil, 0, corrupt("sparse map goes beyond the data")
		}
		left -= p.length
	}
	if left != 0 {
		return nil, 0, corrupt("%d bytes of data that the sparse map does not place", left)
	}
	return parts, size, nil
}

// sparseKind tells the formats apart as archive/tar does; "" is no sparse file.
func sparseKind(hdr *tar.Header) string {
	major, minor := hdr.PAXRecords[paxSparseMajor], hdr.PAXRecords[paxSparseMinor]
	switch {
	case hdr.Typeflag == tar.TypeGNUSparse:
		return "old"
	case major == "0" && (minor == "0" || minor == "1"):
		return "0"
	case major == "1" && minor == "0":
		return "1"
	case major != "" || minor != "":
		return ""
	case hdr.PAXRecords[paxSparseMap] != "":
		return "0"
	}
	return ""
}

// mainHeader skips the extension headers that stand before an entry's own.
func mainHeader(head []byte) []byte {
	for len(head) >= tarBlock {
		switch head[156] {
		case tar.TypeXHeader, tar.TypeGNULongName, tar.TypeGNULongLink:
			n, err := number(head[124:136])
			if err != nil || n < 0 || n > int64(len(head)) {
				return nil
			}
			n += tarBlock + -n&(tarBlock-1)
			head = head[min(n, int64(len(head))):]
		default:
			return head
		}
	}
	return nil
}

func decimals(fields []string) ([]part, error) {
	if len(fields) == 1 && fields[0] == "" {
		fields = nil
	}
	parts := make([]part, 0, len(fields)/2)
	for ; len(fields) >= 2; fields = fields[2:] {
		off, err := strconv.ParseInt(fields[0], 10, 64)
		if err != nil {
			return nil, err
		}
		n, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return nil, err
		}
		parts = append(parts, part{off, n})
	}
	return parts, nil
}

// number reads a numeric field of a tar header: octal digits, or GNU's base 256
// where the first bit is set.
func number(b []byte) (int64, error) {
	if len(b) > 0 && b[0]&0x80 != 0 {
		v := int64(b[0] & 0x3f)
		if b[0]&0x40 != 0 {
			v -= 0x40
		}
		for _, c := range b[1:] {
			if v >= 1<<55 || v < -1<<55 {
				return 0, strconv.ErrRange
			}
			v = v<<8 | int64(c)
		}
		return v, nil
	}
	b = bytes.Trim(b, " \x00")
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	if len(b) == 0 {
		return 0, nil
	}
	return strconv.ParseInt(string(b), 8, 64)
}

// extents addresses the parts of a sparse file in the diff, where its data
// starts at the 512-aligned byte at. It reports false if blocks cannot: the tar
// was written by a program that does not keep parts to whole blocks.
func extents(parts []part, at, size int64) ([]erofs.Extent, bool) {
	var ext []erofs.Extent
	for i, p := range parts {
		if p.length == 0 {
			continue
		}
		if (p.offset|at)%tarBlock != 0 {
			return nil, false
		}
		n := p.length
		if rest := n % tarBlock; rest != 0 && p.offset+n < size {
			// The block's rest is zero in the file, and so it is in the masked diff
			// if it is padding.
			for _, q := range parts[i+1:] {
				if q.length > 0 {
					return nil, false
				}
			}
			n = min(n+tarBlock-rest, size-p.offset)
		}
		if k := len(ext) - 1; k >= 0 && ext[k].Offset+ext[k].Length == p.offset {
			ext[k].Length += n // at is where that extent ends
		} else {
			ext = append(ext, erofs.Extent{Offset: p.offset, DiffOffset: at, Length: n})
		}
		at += p.length
	}
	return ext, true
}

// place copies data, the next bytes of the parts, to where they belong in file,
// and returns the parts still to come. It changes parts.
func place(file []byte, parts []part, data []byte) []part {
	for len(data) > 0 && len(parts) > 0 {
		p := &parts[0]
		n := copy(file[p.offset:p.offset+p.length], data)
		data = data[n:]
		p.offset += int64(n)
		p.length -= int64(n)
		if p.length == 0 {
			parts = parts[1:]
		}
	}
	return parts
}
