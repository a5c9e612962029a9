package mount

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/erofs"
)

// attribute is an extended attribute that images have, and what the kernel does
// not do without an option.
type attribute struct {
	file, name string
	value      []byte
	option     string
	without    string
}

// attributes are one for each option of EROFS that a kernel may lack in silence.
func attributes() []attribute {
	acl := binary.LittleEndian.AppendUint32(nil, 2) // its version
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{0x01, 6, 1<<32 - 1}, {0x02, 4, 1000}, {0x04, 4, 1<<32 - 1}, {0x10, 4, 1<<32 - 1}, {0x20, 4, 1<<32 - 1}} {
		acl = binary.LittleEndian.AppendUint16(acl, e.tag)
		acl = binary.LittleEndian.AppendUint16(acl, e.perm)
		acl = binary.LittleEndian.AppendUint32(acl, e.id)
	}
	// VFS_CAP_REVISION_2, effective; cap_net_bind_service permitted.
	capability := binary.LittleEndian.AppendUint32(nil, 0x02000001)
	capability = append(capability, 0, 1<<2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)[:20]
	return []attribute{
		{"opaque", "trusted.overlay.opaque", []byte("y"), "CONFIG_EROFS_FS_XATTR", "what a layer replaces or deletes would be there again"},
		{"capable", "security.capability", capability, "CONFIG_EROFS_FS_SECURITY", "programs would run without their capabilities"},
		{"listed", "system.posix_acl_access", acl, "CONFIG_EROFS_FS_POSIX_ACL", "access control lists would not count"},
	}
}

// Probe mounts a tiny image at dir/mnt, and looks whether this kernel shows all that
// images have. dir is made, and removed with what an earlier Probe has left there.
// The error wraps blockdev.ErrUnsupported if the kernel cannot mount block images,
// or shows them without what containers rely on.
func Probe(dir string, o Options) (err error) {
	mnt := filepath.Join(dir, "mnt")
	remove := func() error {
		if err := Detach(mnt); err != nil {
			return err
		}
		return os.RemoveAll(dir)
	}
	if err := remove(); err != nil {
		return err
	}
	if err := os.MkdirAll(mnt, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	attrs := attributes()
	root := &erofs.Inode{Mode: unix.S_IFDIR | 0o700}
	for _, a := range attrs {
		in := &erofs.Inode{Mode: unix.S_IFREG | 0o644, Xattrs: []erofs.Xattr{{Name: a.name, Value: a.value}}}
		if a.file == "opaque" {
			in.Mode = unix.S_IFDIR | 0o755
		}
		root.Children = append(root.Children, erofs.Dirent{Name: a.file, Inode: in})
	}
	var image bytes.Buffer
	const block = 4096
	if err := erofs.Write(&image, root, block); err != nil {
		return err
	}
	meta, data := filepath.Join(dir, "meta"), filepath.Join(dir, "data")
	if err := os.WriteFile(meta, image.Bytes(), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(data, make([]byte, block), 0o600); err != nil {
		return err
	}
	if _, err := Mount(meta, data, mnt, o); err != nil {
		return err
	}
	return checkAttributes(mnt, attrs)
}

// checkAttributes says which of the attributes are not there.
func checkAttributes(dir string, attrs []attribute) error {
	var errs []error
	for _, a := range attrs {
		got := make([]byte, len(a.value)+1)
		n, err := unix.Lgetxattr(filepath.Join(dir, a.file), a.name, got)
		if err == nil && !bytes.Equal(got[:n], a.value) {
			err = fmt.Errorf("it reads %x instead of %x", got[:n], a.value)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%w: kernel %s does not show the attribute %s of EROFS' files (it needs %s): %s: %w",
				blockdev.ErrUnsupported, release(), a.name, a.option, a.without, err))
		}
	}
	return errors.Join(errs...)
}
