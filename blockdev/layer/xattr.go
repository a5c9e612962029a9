package layer

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/shoalfs/shoal/blockdev/erofs"
)

const (
	paxXattr        = "SCHILY.xattr." // prefix of PAX records
	xattrTrusted    = "trusted."
	xattrUser       = "user."
	xattrSecurity   = "security."
	xattrCapability = "security.capability"
	xattrACL        = "system.posix_acl_access"
	xattrDefaultACL = "system.posix_acl_default"

	maxXattrName  = 255   // bytes, XATTR_NAME_MAX
	maxXattrValue = 65535 // bytes, what EROFS stores; one less than XATTR_SIZE_MAX
)

// xattrs sets what the PAX records say, with the answers of Linux (root, no
// security module) and what containerd makes of them.
func (t *tree) xattrs(in *erofs.Inode, hdr *tar.Header) error {
	var names []string
	for k := range hdr.PAXRecords {
		if name, ok := strings.CutPrefix(k, paxXattr); ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		value := hdr.PAXRecords[paxXattr+name]
		if strings.HasPrefix(name, xattrTrusted) {
			continue // containerd takes these from nobody
		}
		if name == "" || len(name) > maxXattrName || len(value) > maxXattrValue {
			return unsupported("extended attribute %.80q with a name of %d and a value of %d bytes; at most %d and %d are possible",
				name, len(name), len(value), maxXattrName, maxXattrValue)
		}
		if err := t.xattr(in, name, []byte(value)); err != nil {
			return err
		}
	}
	return nil
}

func (t *tree) xattr(in *erofs.Inode, name string, value []byte) error {
	typ := in.Mode & modeType
	switch {
	case strings.HasPrefix(name, xattrUser):
		if typ != modeRegular && typ != modeDir {
			return nil // EPERM, which containerd passes over here
		}
	case name == xattrACL || name == xattrDefaultACL:
		if typ == modeSymlink {
			return nil // EOPNOTSUPP
		}
		return t.acl(in, name, value)
	case name == xattrCapability:
		var ok bool
		if value, ok = capability(value); !ok {
			return unsupported("%s of %d bytes does not have a form that Linux accepts", name, len(value))
		}
	case strings.HasPrefix(name, xattrSecurity):
	default:
		return nil // EOPNOTSUPP, which containerd passes over
	}
	if name == xattrUser || name == xattrSecurity {
		return unsupported("extended attribute %q has no name after its prefix", name)
	}
	setXattr(in, name, value)
	return t.charge(0, len(name)+len(value))
}

// capability checks a security.capability of revision 2 or 3 as
// cap_convert_nscap does, which also drops unknown flags from the latter.
func capability(v []byte) ([]byte, bool) {
	const flagEffective = 1
	if len(v) != 20 && len(v) != 24 {
		return v, false
	}
	magic := binary.LittleEndian.Uint32(v)
	switch {
	case len(v) == 20 && magic>>24 == 2:
		return v, true
	case len(v) == 24 && magic>>24 == 3:
		v = bytes.Clone(v)
		binary.LittleEndian.PutUint32(v, 3<<24|magic&flagEffective)
		return v, binary.LittleEndian.Uint32(v[20:]) != unchanged
	}
	return v, false
}

func findXattr(in *erofs.Inode, name string) int {
	return slices.IndexFunc(in.Xattrs, func(x erofs.Xattr) bool { return x.Name == name })
}

func setXattr(in *erofs.Inode, name string, value []byte) {
	if i := findXattr(in, name); i >= 0 {
		in.Xattrs[i].Value = value
		return
	}
	in.Xattrs = append(in.Xattrs, erofs.Xattr{Name: strings.Clone(name), Value: value})
}

func removeXattr(in *erofs.Inode, name string) {
	if i := findXattr(in, name); i >= 0 {
		in.Xattrs = slices.Delete(in.Xattrs, i, i+1)
	}
}

func getXattr(in *erofs.Inode, name string) []byte {
	if i := findXattr(in, name); i >= 0 {
		return in.Xattrs[i].Value
	}
	return nil
}
