package layer

import (
	"bytes"
	"encoding/binary"

	"github.com/shoalfs/shoal/blockdev/erofs"
)

// POSIX ACLs in the form of their extended attributes: a version, then entries
// of tag, permissions and id (include/uapi/linux/posix_acl_xattr.h). What
// happens to them on create, chmod and setxattr is fs/posix_acl.c.
const (
	aclVersion = 2
	aclHead    = 4
	aclEntry   = 8

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20

	aclNoID = 0xffffffff
)

type aclItem []byte // one entry

func (e aclItem) tag() uint16  { return binary.LittleEndian.Uint16(e) }
func (e aclItem) perm() uint16 { return binary.LittleEndian.Uint16(e[2:]) }
func (e aclItem) id() uint32   { return binary.LittleEndian.Uint32(e[4:]) }

func (e aclItem) setPerm(p uint32) { binary.LittleEndian.PutUint16(e[2:], uint16(p&7)) }

func aclItems(v []byte) func(func(aclItem) bool) {
	return func(yield func(aclItem) bool) {
		for at := aclHead; at+aclEntry <= len(v); at += aclEntry {
			if !yield(aclItem(v[at : at+aclEntry])) {
				return
			}
		}
	}
}

// acl is setxattr(2) of an ACL.
func (t *tree) acl(in *erofs.Inode, name string, value []byte) error {
	if len(value) == 0 || len(value) == aclHead && binary.LittleEndian.Uint32(value) == aclVersion {
		removeXattr(in, name) // an ACL without entries
		return nil
	}
	value = bytes.Clone(value)
	extended, ok := checkACL(value)
	if !ok {
		return unsupported("%s is not a valid ACL", name)
	}
	if name == xattrDefaultACL {
		if !isDir(in) {
			return unsupported("%s on something that is not a directory", name)
		}
	} else if !extended {
		// It says no more than the mode, which chmod sets next.
		removeXattr(in, name)
		return nil
	}
	setXattr(in, name, value)
	return t.charge(0, len(name)+len(value))
}

// checkACL is posix_acl_valid. It clears ids that mean nothing, as the kernel
// forgets them, and reports whether the ACL says more than a mode can.
func checkACL(v []byte) (extended, ok bool) {
	if len(v) < aclHead || (len(v)-aclHead)%aclEntry != 0 || binary.LittleEndian.Uint32(v) != aclVersion {
		return false, false
	}
	named := false
	want := aclUserObj // the tag that the order of entries has got to
	for e := range aclItems(v) {
		if e.perm()&^7 != 0 {
			return false, false
		}
		tag := int(e.tag())
		switch {
		case tag == aclUserObj && want == aclUserObj:
			want = aclUser
		case tag == aclGroupObj && want == aclUser:
			want = aclGroup
		case tag == aclUser && want == aclUser, tag == aclGroup && want == aclGroup:
			if e.id() == aclNoID {
				return false, false
			}
			named, extended = true, true
			continue // keeps its id
		case tag == aclMask && want == aclGroup:
			want, extended = aclOther, true
		case tag == aclOther && (want == aclOther || want == aclGroup && !named):
			want = 0
		default:
			return false, false
		}
		binary.LittleEndian.PutUint32(e[4:], aclNoID)
	}
	return extended, want == 0
}

// inheritACL gives a new inode what the default ACL of its directory makes of
// it, and returns the bytes that takes. The permissions follow by changeMode,
// which every creation ends with.
func inheritACL(d, in *erofs.Inode) (size int) {
	v := getXattr(d, xattrDefaultACL)
	if v == nil || isSymlink(in) {
		return 0
	}
	if isDir(in) {
		setXattr(in, xattrDefaultACL, v)
	}
	access := bytes.Clone(v)
	if extended, _ := checkACL(access); extended {
		setXattr(in, xattrACL, access)
	}
	return 2 * (len(xattrACL) + len(v))
}

// changeModeACL lets the access ACL follow the mode: where there is a mask, it
// is what the mode's group bits mean. An access ACL without one is never kept.
func changeModeACL(in *erofs.Inode) {
	v := getXattr(in, xattrACL)
	if v == nil {
		return
	}
	v = bytes.Clone(v)
	for e := range aclItems(v) {
		switch e.tag() {
		case aclUserObj:
			e.setPerm(in.Mode >> 6)
		case aclMask:
			e.setPerm(in.Mode >> 3)
		case aclOther:
			e.setPerm(in.Mode)
		}
	}
	setXattr(in, xattrACL, v)
}
