package erofs

import (
	"encoding/binary"
	"math"
	"slices"
	"strings"
)

// maxShared is how many shared attributes one inode can refer to (8 bits).
const maxShared = math.MaxUint8

// maxXattrArea is what i_xattr_icount (16 bits) can count, in bytes.
const maxXattrArea = sizeXattrHead + 4*(math.MaxUint16-1)

// xattrPrefixes are the namespaces that EROFS has, in the order in which they
// are tried. The kernel's list has lustre as well, which it does not show.
func splitXattr(name string) (index byte, rest string, ok bool) {
	switch name {
	case "system.posix_acl_access":
		return 2, "", true
	case "system.posix_acl_default":
		return 3, "", true
	}
	for _, p := range []struct {
		prefix string
		index  byte
	}{{"user.", 1}, {"trusted.", 4}, {"security.", 6}} {
		if rest, ok := strings.CutPrefix(name, p.prefix); ok && rest != "" {
			return p.index, rest, true
		}
	}
	return 0, "", false
}

// xattrSize is the length of one entry, padded to 4 bytes.
func xattrSize(x *Xattr) int64 {
	_, rest, _ := splitXattr(x.Name)
	return alignUp(int64(sizeXattr+len(rest)+len(x.Value)), 4)
}

func appendXattr(b []byte, x *Xattr) []byte {
	index, rest, _ := splitXattr(x.Name)
	b = append(b, byte(len(rest)), index)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(x.Value))) // checkXattrs: at most maxXattr
	b = append(b, rest...)
	b = append(b, x.Value...)
	return append(b, make([]byte, -len(b)&3)...)
}

func checkXattrs(xs []Xattr) error {
	for i := range xs {
		x := &xs[i]
		if len(x.Name) > maxName || strings.IndexByte(x.Name, 0) >= 0 {
			return unsupported("extended attribute name %.40q... of %d bytes is too long or holds NUL", x.Name, len(x.Name))
		}
		if _, _, ok := splitXattr(x.Name); !ok {
			return unsupported("extended attribute %q: EROFS has only user.*, trusted.*, security.* and POSIX ACLs", x.Name)
		}
		if len(x.Value) > maxXattr {
			return unsupported("extended attribute %q: value of %d bytes, at most %d fit", x.Name, len(x.Value), maxXattr)
		}
	}
	if len(xs) > 1 {
		names := make([]string, len(xs))
		for i := range xs {
			names[i] = xs[i].Name
		}
		slices.Sort(names)
		for i := 1; i < len(names); i++ {
			if names[i] == names[i-1] {
				return corrupt("extended attribute %q occurs twice", names[i])
			}
		}
	}
	return nil
}

// sortedXattrs returns xs in the order in which they are emitted.
func sortedXattrs(xs []Xattr) []Xattr {
	if slices.IsSortedFunc(xs, compareXattr) {
		return xs
	}
	xs = slices.Clone(xs)
	slices.SortFunc(xs, compareXattr)
	return xs
}

func compareXattr(a, b Xattr) int { return strings.Compare(a.Name, b.Name) }

// sharedXattrs finds the attributes that several inodes have with the same
// value; they are kept once.
type sharedXattrs struct {
	users map[string]int32 // key -> number of inodes; after place: index in order, or -1
	order []sharedXattr
	size  int64 // bytes
}

type sharedXattr struct {
	x  Xattr
	id uint32 // offset in the shared area / 4
}

// key cannot collide: a name has no NUL.
func xattrKey(buf []byte, x *Xattr) []byte {
	buf = append(append(buf[:0], x.Name...), 0)
	return append(buf, x.Value...)
}

func (s *sharedXattrs) count(xs []Xattr) {
	var buf []byte
	for i := range xs {
		buf = xattrKey(buf, &xs[i])
		if n, ok := s.users[string(buf)]; ok {
			if n == 1 {
				s.order = append(s.order, sharedXattr{x: xs[i]})
			}
			s.users[string(buf)] = n + 1
		} else {
			if s.users == nil {
				s.users = make(map[string]int32)
			}
			s.users[string(buf)] = 1
		}
	}
}

// place orders the shared attributes and gives them their ids.
func (s *sharedXattrs) place() error {
	for k := range s.users {
		s.users[k] = -1
	}
	slices.SortFunc(s.order, func(a, b sharedXattr) int {
		if c := strings.Compare(a.x.Name, b.x.Name); c != 0 {
			return c
		}
		return slices.Compare(a.x.Value, b.x.Value)
	})
	var buf []byte
	for i := range s.order {
		o := &s.order[i]
		o.id = uint32(s.size / 4) // below MaxSize
		s.size += xattrSize(&o.x)
		if err := checkTotal(s.size); err != nil {
			return err
		}
		buf = xattrKey(buf, &o.x)
		s.users[string(buf)] = int32(i) // no more than there are inodes with attributes
	}
	return nil
}

// split sorts an inode's attributes into references and inline entries.
func (s *sharedXattrs) split(xs []Xattr) (refs []uint32, inline []Xattr) {
	var buf []byte
	for _, x := range sortedXattrs(xs) {
		buf = xattrKey(buf, &x)
		if i := s.users[string(buf)]; i >= 0 && len(refs) < maxShared {
			refs = append(refs, s.order[i].id)
		} else {
			inline = append(inline, x)
		}
	}
	return refs, inline
}

// bodySize is the length in bytes of all that follows an inode for its
// attributes: 0 without any, else a header, references and inline entries.
func (s *sharedXattrs) bodySize(xs []Xattr) (int64, error) {
	if len(xs) == 0 {
		return 0, nil
	}
	refs, inline := s.split(xs)
	size := int64(sizeXattrHead + 4*len(refs))
	for i := range inline {
		size += xattrSize(&inline[i])
	}
	if size > maxXattrArea {
		return 0, unsupported("extended attributes of %d bytes, at most %d fit one inode", size, maxXattrArea)
	}
	return size, nil
}

func (s *sharedXattrs) appendBody(b []byte, xs []Xattr) []byte {
	if len(xs) == 0 {
		return b
	}
	refs, inline := s.split(xs)
	// The name filter (first 4 bytes) is not used: its feature bit is not set.
	b = append(b, 0, 0, 0, 0, byte(len(refs)), 0, 0, 0, 0, 0, 0, 0)
	for _, id := range refs {
		b = binary.LittleEndian.AppendUint32(b, id)
	}
	for i := range inline {
		b = appendXattr(b, &inline[i])
	}
	return b
}
