package erofs

import (
	"fmt"
	"math"
	"strings"

	"github.com/shoalfs/shoal/blockdev"
)

// Limits of trees.
const (
	// MaxSize is the largest image that Write makes, in bytes. It bounds what a
	// hostile layer can cost a node.
	MaxSize = 256 << 20
	// MaxDiffSize is the largest masked diff that block addresses of 32 bits
	// reach (the last address means "hole"), in bytes.
	MaxDiffSize = math.MaxUint32 * blockSize

	maxName    = 255  // bytes, of a directory entry and of a full xattr name
	maxSymlink = 4095 // bytes, PATH_MAX without its NUL
	maxNsec    = 999_999_999
	maxXattr   = math.MaxUint16 // bytes, of one value
)

// File types of st_mode (Linux's S_IFMT values, the same on every platform).
const (
	modeType    = 0o170000
	modeFIFO    = 0o010000
	modeChar    = 0o020000
	modeDir     = 0o040000
	modeBlock   = 0o060000
	modeRegular = 0o100000
	modeSymlink = 0o120000
	modeSocket  = 0o140000
)

// Xattr is one extended attribute.
type Xattr struct {
	// Name is the full name: "security.capability", "user.x",
	// "trusted.overlay.opaque", "system.posix_acl_access". EROFS has no place
	// for other namespaces.
	Name string
	// Value has at most 65,535 bytes.
	Value []byte
}

// Extent says where a part of a file's content lies. All values are bytes and
// multiples of 512, but that the Length of an extent that ends at the file's
// end is what it is.
type Extent struct {
	Offset     int64 // in the file
	DiffOffset int64 // in the masked diff
	Length     int64 // at least 1
}

// Inode is a file of any type. One Inode under several names is a hard link.
type Inode struct {
	// Mode is st_mode: type, permissions, set-id and sticky bits.
	Mode     uint32
	UID, GID uint32
	// MtimeSec and MtimeNsec are the time of last modification: seconds since
	// 1970 (negative before that) and the nanoseconds that come on top.
	MtimeSec  int64
	MtimeNsec uint32
	// Rdev is the device number of character and block devices in the form of
	// Linux's new_encode_dev: minor&0xff | major<<8 | (minor&^0xff)<<12.
	Rdev uint32
	// Size is the length of a regular file, in bytes; of no meaning elsewhere.
	Size int64
	// Extents are a regular file's content, sorted by Offset; what lies between
	// them reads as zeros.
	Extents []Extent
	// Inline is content that the image itself keeps: a symlink's target, or all
	// of a regular file that no range of blocks can address (then there are no
	// Extents, and Size is its length).
	Inline []byte
	// Xattrs are in any order; names must differ.
	Xattrs []Xattr
	// Children are a directory's entries, in any order, without "." and "..".
	Children []Dirent
}

// Dirent is a name in a directory.
type Dirent struct {
	Name  string
	Inode *Inode
}

// corrupt is for trees that contradict themselves or the diff.
func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{blockdev.ErrCorrupt}, args...)...)
}

// unsupported is for what EROFS, or MaxSize, has no room for.
func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{blockdev.ErrUnsupported}, args...)...)
}

func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return corrupt("%q cannot be the name of a directory entry", name)
	case len(name) > maxName:
		return unsupported("name of %d bytes (%.40q...), at most %d fit", len(name), name, maxName)
	case strings.ContainsAny(name, "/\x00"):
		return corrupt("name %q holds a slash or NUL", name)
	}
	return nil
}

// check validates one inode by itself. diffSize is the length of the masked
// diff in bytes, blk the block size that extents are aligned to.
func (in *Inode) check(diffSize, blk int64) error {
	if in.MtimeNsec > maxNsec {
		return corrupt("mtime has %d nanoseconds", in.MtimeNsec)
	}
	if in.Mode&^(modeType|0o7777) != 0 {
		return corrupt("mode %#o has bits beyond type and permissions", in.Mode)
	}
	typ := in.Mode & modeType
	switch typ {
	case modeRegular:
		if err := in.checkContent(diffSize, blk); err != nil {
			return err
		}
	case modeSymlink:
		if len(in.Inline) == 0 {
			return corrupt("symlink without a target")
		}
		if len(in.Inline) > maxSymlink {
			return unsupported("symlink target of %d bytes, at most %d fit", len(in.Inline), maxSymlink)
		}
		if strings.IndexByte(string(in.Inline), 0) >= 0 {
			return corrupt("symlink target holds NUL")
		}
	case modeDir, modeChar, modeBlock, modeFIFO, modeSocket:
	default:
		return corrupt("mode %#o has no known file type", in.Mode)
	}
	switch {
	case typ != modeRegular && len(in.Extents) > 0:
		return corrupt("extents on something that is not a regular file (mode %#o)", in.Mode)
	case typ != modeRegular && typ != modeSymlink && len(in.Inline) > 0:
		return corrupt("inline content on something that cannot have content (mode %#o)", in.Mode)
	case typ != modeDir && len(in.Children) > 0:
		return corrupt("children of something that is not a directory (mode %#o)", in.Mode)
	}
	return nil
}

func (in *Inode) checkContent(diffSize, blk int64) error {
	if in.Size < 0 {
		return corrupt("size %d", in.Size)
	}
	if len(in.Inline) > 0 {
		if len(in.Extents) > 0 {
			return corrupt("both inline content and extents")
		}
		if int64(len(in.Inline)) != in.Size {
			return corrupt("size %d, but %d bytes of inline content", in.Size, len(in.Inline))
		}
		return nil
	}
	var end int64
	for _, e := range in.Extents {
		switch {
		case e.Offset < 0 || e.DiffOffset < 0 || e.Length <= 0:
			return corrupt("extent %+v is negative or empty", e)
		case e.Offset < end:
			return corrupt("extent %+v overlaps the one before it, which ends at %d", e, end)
		case e.Length > in.Size || e.Offset > in.Size-e.Length:
			return corrupt("extent %+v goes beyond the file's size %d", e, in.Size)
		case e.Length > diffSize || e.DiffOffset > diffSize-e.Length:
			return corrupt("extent %+v goes beyond the diff's size %d", e, diffSize)
		case (e.Offset|e.DiffOffset)%blk != 0:
			return corrupt("extent %+v does not start on a block of %d bytes", e, blk)
		}
		end = e.Offset + e.Length
		if end%blk != 0 && end != in.Size {
			return corrupt("extent %+v ends inside a block of %d bytes and is not the file's last", e, blk)
		}
	}
	return nil
}
