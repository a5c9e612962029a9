package cache

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev/cache/internal/disk"
)

// extentsPerBlock is how many extents of a file a file system describes in one
// block, or fewer: ext4 has 340 in 4 KiB, xfs 254.
const extentsPerBlock = 250

// use is what the diff takes of the disk: its data file, and all others.
func (d *local) use() (data, others int64, err error) {
	if data, err = diskUse(d.data); err != nil {
		return 0, 0, err
	}
	others, err = d.fixedUse()
	return data, others, err
}

// fixedUse is what all files of a diff but the data take, with its directory, and
// with room for what comes later by itself: the record of a proof, and where the
// data file's extents lie, which some file systems write down, and count, only
// with the data.
func (d *local) fixedUse() (n int64, err error) {
	n = int64(1+d.tab.Len()/extentsPerBlock) * d.c.room.Block
	for _, name := range []string{"", indexFile, metaFile, bitmapFile, headersFile, ownIndexFile, ownMetaFile, proofFile} {
		var st unix.Stat_t
		path := d.path(name)
		err := unix.Lstat(path, &st)
		switch {
		case name == proofFile && (err != nil || st.Blocks*512 < d.c.room.Block):
			n += d.c.room.Block
		case (name == headersFile || name == ownIndexFile || name == ownMetaFile) && errors.Is(err, unix.ENOENT):
		case err != nil:
			return 0, &os.PathError{Op: "stat", Path: path, Err: err}
		default:
			n += st.Blocks * 512
		}
	}
	return n, nil
}

// diskUse is what a file takes of the disk, in bytes.
func diskUse(f *os.File) (int64, error) {
	var st unix.Stat_t
	if err := disk.Control(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return 0, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st.Blocks * 512, nil
}
