package layer

import (
	"archive/tar"
	"math"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev/erofs"
)

// Whiteouts as the OCI image specification has them ("Filesystem Layers"), and
// as overlayfs wants them.
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	overlayOpaque  = "trusted.overlay.opaque"
)

// unchanged is the owner that chown(2) leaves as it is.
const unchanged = math.MaxUint32

// apply does to the tree what containerd does for an entry. It returns the
// inode that the entry's data belongs to; nil if it belongs to nothing.
func (t *tree) apply(hdr *tar.Header) (*erofs.Inode, error) {
	if err := t.charge(1, 0); err != nil {
		return nil, err
	}
	name := path.Clean(hdr.Name)
	if len(name) > MaxPath {
		return nil, unsupported("path of %d bytes, at most %d are possible", len(name), MaxPath)
	}
	if leavesRoot(name) {
		return nil, unsupported("the name leaves the root")
	}
	if name == "." || name == "/" {
		return nil, nil
	}
	in, base := path.Split(name)
	d, err := t.parent(in)
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return nil, t.whiteout(d, base, hdr)
	}
	old := t.lookup(d, base)
	if old != nil && !(isDir(old) && hdr.Typeflag == tar.TypeDir) {
		t.remove(d, base)
		old = nil
	}
	switch hdr.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil, nil
	case tar.TypeLink:
		return nil, t.link(d, base, hdr)
	case tar.TypeDir:
		return nil, t.directory(d, base, name, old, hdr)
	}
	var mode, rdev uint32
	var target []byte
	switch hdr.Typeflag {
	case tar.TypeReg: // the reader has turned TypeRegA into this
		mode = modeRegular
	case tar.TypeSymlink:
		if n := len(hdr.Linkname); n == 0 || n > MaxPath {
			return nil, unsupported("symlink with a target of %d bytes, 1 to %d are possible", n, MaxPath)
		}
		mode, target = modeSymlink|0o777, []byte(hdr.Linkname)
		if err := t.charge(0, len(target)); err != nil {
			return nil, err
		}
	case tar.TypeChar:
		mode, rdev = modeChar, device(hdr)
	case tar.TypeBlock:
		mode, rdev = modeBlock, device(hdr)
	case tar.TypeFifo:
		mode = modeFIFO
	default: // the old GNU sparse format among them, which containerd does not unpack either
		return nil, unsupported("entry of type %q", hdr.Typeflag)
	}
	file, err := t.create(d, base, mode)
	if err != nil {
		return nil, err
	}
	file.Rdev, file.Inline = rdev, target
	if err := t.attributes(file, hdr); err != nil {
		return nil, err
	}
	if mode != modeRegular {
		return nil, nil
	}
	return file, nil
}

// leavesRoot is for clean names.
func leavesRoot(name string) bool { return name == ".." || strings.HasPrefix(name, "../") }

// device is what mknod(2) makes of the numbers, of which it takes 12 and 20
// bits; unix.Mkdev has them in the low half, in the form of new_encode_dev.
func device(hdr *tar.Header) uint32 {
	return uint32(unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor)))
}

func (t *tree) directory(d *erofs.Inode, base, name string, old *erofs.Inode, hdr *tar.Header) error {
	if old == nil {
		var err error
		if old, err = t.create(d, base, modeDir); err != nil {
			return err
		}
	}
	t.dirs[old].implied, t.dirs[old].path = false, ""
	sec, nsec := mtime(hdr)
	if err := t.charge(0, len(name)); err != nil {
		return err
	}
	t.times = append(t.times, dirTime{name, sec, nsec})
	return t.attributes(old, hdr)
}

func (t *tree) link(d *erofs.Inode, base string, hdr *tar.Header) error {
	if leavesRoot(path.Clean(hdr.Linkname)) {
		return unsupported("hard link to %.200q, which leaves the root", hdr.Linkname)
	}
	in, last := path.Split(hdr.Linkname)
	steps, err := t.resolve(in)
	if err != nil {
		return err
	}
	file := t.root
	if n := len(steps); n > 0 {
		file = steps[n-1].in
	}
	switch {
	case last == "" || last == ".": // "a/b/" is a/b, whatever that is
	case last == "..":
		file = t.root // some directory, at any rate
	case isDir(file):
		file = t.lookup(file, last)
	case file != nil:
		return unsupported("hard link to %.200q, but %q is not a directory", hdr.Linkname, join(steps))
	}
	switch {
	case file == nil:
		return unsupported("hard link to %.200q, which is not in this layer", hdr.Linkname)
	case isDir(file):
		return unsupported("hard link to %.200q, a directory", hdr.Linkname)
	}
	if err := t.add(d, base, file); err != nil {
		return err
	}
	return t.attributes(file, hdr)
}

func (t *tree) whiteout(d *erofs.Inode, base string, hdr *tar.Header) error {
	if base == whiteoutOpaque {
		setXattr(d, overlayOpaque, []byte{'y'})
		return t.charge(0, len(overlayOpaque))
	}
	gone := base[len(whiteoutPrefix):]
	if gone == "" || gone == "." || gone == ".." {
		return unsupported("whiteout without a name that can be deleted")
	}
	if t.lookup(d, gone) != nil {
		return unsupported("whiteout of %q, which this layer has as well", gone)
	}
	in, err := t.create(d, gone, modeChar)
	if err != nil {
		return err
	}
	changeOwner(in, hdr)
	changeMode(in, 0)
	in.MtimeSec, in.MtimeNsec = mtime(hdr)
	return nil
}

// attributes sets those of an entry, in containerd's order.
func (t *tree) attributes(in *erofs.Inode, hdr *tar.Header) error {
	changeOwner(in, hdr)
	if err := t.xattrs(in, hdr); err != nil {
		return err
	}
	changeMode(in, uint32(hdr.Mode&modePerm)) // 12 bits
	in.MtimeSec, in.MtimeNsec = mtime(hdr)
	return nil
}

// changeOwner is lchown(2): 32 bits count, -1 leaves things as they are, and
// what is no directory loses its capabilities.
func changeOwner(in *erofs.Inode, hdr *tar.Header) {
	if uid := uint32(hdr.Uid); uid != unchanged {
		in.UID = uid
	}
	if gid := uint32(hdr.Gid); gid != unchanged {
		in.GID = gid
	}
	if !isDir(in) {
		removeXattr(in, xattrCapability)
	}
}

// changeMode is chmod(2) on what is no symlink.
func changeMode(in *erofs.Inode, perm uint32) {
	if isSymlink(in) {
		return
	}
	in.Mode = in.Mode&modeType | perm
	changeModeACL(in)
}

// mtime is bounded as containerd does it: what nanoseconds since 1970 in 63
// bits cannot say becomes 1970.
func mtime(hdr *tar.Header) (sec int64, nsec uint32) {
	t := hdr.ModTime
	if t.Before(time.Unix(0, 0)) || t.After(time.Unix(0, math.MaxInt64)) {
		return 0, 0
	}
	return t.Unix(), uint32(t.Nanosecond()) // below 1e9
}

// finish sets the times of directories again: in containerd the children
// have changed them by then. A name that has come to mean another thing gives
// its time to that.
func (t *tree) finish() error {
	if !t.replaced { // then attributes has set them all
		t.times = nil
		return nil
	}
	for _, d := range t.times {
		steps, err := t.resolve(d.name)
		if err != nil {
			return unsupported("time of directory %.200q: %w", d.name, err)
		}
		in := t.root
		if n := len(steps); n > 0 {
			in = steps[n-1].in
		}
		if in == nil {
			return unsupported("directory %.200q has been replaced by a symlink to nothing", d.name)
		}
		if in != t.root {
			in.MtimeSec, in.MtimeNsec = d.sec, d.nsec
		}
	}
	t.times = nil
	return nil
}
