package erofs

import (
	"bytes"
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

type treeMaker struct {
	rnd      *rand.Rand
	blk      int64
	diffSize int64
	all      []*Inode // that can be linked to
	left     int
}

func (m *treeMaker) name() string {
	const chars = "abcdefghijklmnopqrstuvwxyz-.!~_ \n\xff\x01é"
	n := 1 + m.rnd.IntN(12)
	switch m.rnd.IntN(40) {
	case 0:
		n = 255
	case 1:
		n = 200 + m.rnd.IntN(55)
	}
	b := make([]byte, n)
	for i := range b {
		b[i] = chars[m.rnd.IntN(len(chars))]
	}
	if s := string(b); s != "." && s != ".." {
		return s
	}
	return "dot"
}

func (m *treeMaker) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(1 + m.rnd.IntN(255))
	}
	return b
}

func (m *treeMaker) xattrs() []Xattr {
	if m.rnd.IntN(3) > 0 {
		return nil
	}
	var xs []Xattr
	seen := map[string]bool{}
	for range 1 + m.rnd.IntN(6) {
		ns := []string{"user.", "trusted.", "security."}[m.rnd.IntN(3)]
		n := ns + string('a'+rune(m.rnd.IntN(26))) + strings.Repeat("x", m.rnd.IntN(30))
		v := m.bytes(m.rnd.IntN(70))
		switch m.rnd.IntN(8) {
		case 0:
			n, v = "security.selinux", []byte("system_u:object_r:"+string('a'+rune(m.rnd.IntN(3)))+"_t:s0\x00")
		case 1:
			n, v = "user.shared", []byte("everybody's")
		case 2:
			v = m.bytes(m.rnd.IntN(2000))
		}
		if !seen[n] && n != "security.capability" {
			seen[n] = true
			xs = append(xs, Xattr{n, v})
		}
	}
	return xs
}

func (m *treeMaker) attrs(mode uint32) *Inode {
	in := &Inode{Mode: mode | uint32(m.rnd.IntN(0o10000)), UID: m.rnd.Uint32N(3), GID: m.rnd.Uint32N(70000),
		MtimeSec: 1700000000, Xattrs: m.xattrs()}
	switch m.rnd.IntN(6) {
	case 0:
		in.MtimeSec, in.MtimeNsec = m.rnd.Int64N(1<<32), m.rnd.Uint32N(maxNsec+1)
	case 1:
		in.MtimeSec, in.MtimeNsec = -m.rnd.Int64N(1<<33), m.rnd.Uint32N(maxNsec+1)
	case 2:
		in.UID = m.rnd.Uint32() - 1
	}
	return in
}

// extents fills in.Size and in.Extents: whole files, files in several pieces,
// with and without holes.
func (m *treeMaker) extents(in *Inode) {
	align := m.blk << m.rnd.IntN(4)
	var off int64
	for range 1 + m.rnd.IntN(5) {
		if m.rnd.IntN(3) == 0 {
			off += align * (1 + m.rnd.Int64N(20))
		}
		n := align * (1 + m.rnd.Int64N(30))
		d := m.blk * m.rnd.Int64N((m.diffSize-n)/m.blk)
		in.Extents = append(in.Extents, Extent{off, d, n})
		off += n
		if m.rnd.IntN(2) == 0 {
			break
		}
	}
	in.Size = off
	switch m.rnd.IntN(4) {
	case 0: // ends inside a block
		cut := m.rnd.Int64N(m.blk)
		in.Size -= cut
		in.Extents[len(in.Extents)-1].Length -= cut
	case 1: // ends in a hole
		in.Size += 1 + m.rnd.Int64N(100_000)
	case 2: // nothing but a hole
		in.Extents = nil
	}
}

func (m *treeMaker) inode(depth int) *Inode {
	m.left--
	var in *Inode
	switch k := m.rnd.IntN(20); {
	case k < 4 && depth < 8:
		in = m.attrs(modeDir)
		m.fill(in, depth+1)
		return in
	case k < 6 && len(m.all) > 0:
		return m.all[m.rnd.IntN(len(m.all))]
	case k < 8:
		in = m.attrs(modeSymlink)
		n := 1 + m.rnd.IntN(60)
		if m.rnd.IntN(5) == 0 {
			n = 1 + m.rnd.IntN(4095)
		}
		in.Inline = m.bytes(n)
		in.Xattrs = slices.DeleteFunc(in.Xattrs, func(x Xattr) bool { return strings.HasPrefix(x.Name, "user.") })
	case k == 8:
		in = m.attrs(modeChar)
		in.Rdev = m.rnd.Uint32()
	case k == 9:
		in = m.attrs(modeBlock)
		in.Rdev = m.rnd.Uint32()
	case k == 10:
		in = m.attrs(modeFIFO)
	case k == 11:
		in = m.attrs(modeSocket)
	case k == 12:
		in = m.attrs(modeRegular)
	case k == 13:
		in = m.attrs(modeRegular)
		in.Inline = m.bytes(1 + m.rnd.IntN(3000))
		in.Size = int64(len(in.Inline))
	default:
		in = m.attrs(modeRegular)
		m.extents(in)
	}
	if typ := in.Mode & modeType; typ != modeRegular && typ != modeDir {
		in.Xattrs = slices.DeleteFunc(in.Xattrs, func(x Xattr) bool { return strings.HasPrefix(x.Name, "user.") })
	}
	m.all = append(m.all, in)
	return in
}

func (m *treeMaker) fill(d *Inode, depth int) {
	n := m.rnd.IntN(20)
	if m.rnd.IntN(10) == 0 {
		n *= 20
	}
	seen := map[string]bool{}
	for ; n > 0 && m.left > 0; n-- {
		if name := m.name(); !seen[name] {
			seen[name] = true
			d.Children = append(d.Children, Dirent{name, m.inode(depth)})
		}
	}
	m.rnd.Shuffle(len(d.Children), func(i, j int) { d.Children[i], d.Children[j] = d.Children[j], d.Children[i] })
}

// randomTree is a function of seed.
func randomTree(seed uint64, inodes int, diffSize, blk int64) *Inode {
	m := &treeMaker{rnd: rand.New(rand.NewPCG(seed, 0)), diffSize: diffSize, blk: blk, left: inodes}
	root := m.attrs(modeDir)
	for m.left > 0 {
		m.left--
		d := m.attrs(modeDir)
		m.fill(d, 1)
		root.Children = append(root.Children, Dirent{fmt.Sprintf("%x", m.left), d})
	}
	return root
}

func randomDiff(seed uint64, n int) []byte {
	b := make([]byte, n)
	c := rand.NewChaCha8([32]byte{byte(seed)})
	_, _ = c.Read(b)
	return b
}

// awkwardTree has what random trees are unlikely to have. The diff has at least 1 MiB.
func awkwardTree(blk int64) *Inode {
	r := dirOf()
	r.MtimeSec = 5
	add := func(name string, in *Inode) *Inode {
		r.Children = append(r.Children, Dirent{name, in})
		return in
	}
	// Every length of attributes, so that chunk maps need every alignment.
	for n := range 80 {
		f := add(fmt.Sprintf("align-%02d", n), &Inode{Mode: modeRegular | 0o644, Size: 3 * blk, MtimeSec: int64(n % 3 * 5),
			Extents: []Extent{{0, int64(n) * blk, 2 * blk}, {2 * blk, int64(n+7) * blk, blk}},
			Xattrs:  []Xattr{{"user." + strings.Repeat("n", 1+n%40), bytes.Repeat([]byte{'v'}, n)}}})
		if n%2 == 0 {
			f.Xattrs = append(f.Xattrs, Xattr{"trusted.shared", []byte("same")})
		}
	}
	// The same for tails: symlinks, inline files and directories of every size.
	for n := 1; n < 600; n += 3 {
		l := add(fmt.Sprintf("link-%03d", n), &Inode{Mode: modeSymlink | 0o777, Inline: bytes.Repeat([]byte{'t'}, n), MtimeSec: int64(n % 2 * 5)})
		f := add(fmt.Sprintf("inline-%03d", n), &Inode{Mode: modeRegular | 0o600, Inline: bytes.Repeat([]byte{'c'}, 3*n), Size: int64(3 * n)})
		d := add(fmt.Sprintf("dir-%03d", n), dirOf(Dirent{strings.Repeat("n", 1+n%255), l}, Dirent{"x", f}))
		if n%4 == 0 {
			x := []Xattr{{"security.t" + strings.Repeat("i", n%50), bytes.Repeat([]byte{'v'}, n)}}
			l.Xattrs, f.Xattrs, d.Xattrs = x[:1:1], []Xattr{{"security.g", x[0].Value}}, []Xattr{{"security.h", x[0].Value}}
		}
	}
	add("link-max", &Inode{Mode: modeSymlink | 0o777, Inline: bytes.Repeat([]byte{'t'}, maxSymlink)})
	add("whiteout", &Inode{Mode: modeChar})
	opaque := dirOf()
	opaque.Xattrs = []Xattr{{"trusted.overlay.opaque", []byte("y")}}
	add("opaque", opaque)
	add("ids", &Inode{Mode: modeRegular | 0o6755, UID: 1<<32 - 2, GID: 65536})
	add("ids16", &Inode{Mode: modeRegular | 0o1000, UID: 65535, GID: 65535})
	add("old", &Inode{Mode: modeRegular, MtimeSec: -1 << 33, MtimeNsec: maxNsec})
	add("new", &Inode{Mode: modeRegular, MtimeSec: 1 << 34, MtimeNsec: 1})
	add("empty", &Inode{Mode: modeRegular | 0o644})
	add("emptydir", dirOf())
	add("!bang", &Inode{Mode: modeFIFO}) // sorts before "." and ".."
	add("-dash", &Inode{Mode: modeSocket})
	add("...", &Inode{Mode: modeBlock, Rdev: 0xfff00000 | 259<<8 | 0xff})
	// ACLs as the kernel's posix_acl_xattr has them: version 2; owner, a user, group, mask, other.
	acl := []byte("\x02\x00\x00\x00" + "\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" +
		"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff")
	for i := range 3 {
		a := dirOf()
		a.Mode = modeDir | 0o640
		a.Xattrs = []Xattr{{"system.posix_acl_access", acl}, {"system.posix_acl_default", acl}}
		add(fmt.Sprintf("acl%d", i), a)
	}
	capability := []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	for _, n := range []string{"ping", "ping6"} {
		add(n, &Inode{Mode: modeRegular | 0o755, Size: 100, Extents: []Extent{{0, 0, 100}}, Xattrs: []Xattr{{"security.capability", capability}}})
	}
	// More shared attributes than one inode can refer to.
	many := make([]Xattr, 400)
	for i := range many {
		many[i] = Xattr{fmt.Sprintf("user.many%03d", i), []byte{byte(i)}}
	}
	for i := range 2 {
		add(fmt.Sprintf("many%d", i), &Inode{Mode: modeRegular, Xattrs: many})
	}
	add("bigxattr", &Inode{Mode: modeRegular, Size: 5, Extents: []Extent{{0, blk, 5}}, Xattrs: []Xattr{{"user.big", bytes.Repeat([]byte{7}, maxXattr)}}})
	add("emptyxattr", &Inode{Mode: modeRegular, Xattrs: []Xattr{{"user.e", nil}}})
	linked := &Inode{Mode: modeRegular, Size: 600, Extents: []Extent{{0, 0, 600}}, MtimeSec: 5}
	var hl []Dirent
	for i := range 300 {
		hl = append(hl, Dirent{fmt.Sprintf("hl%d", i), linked})
	}
	add("links", dirOf(hl...))
	var subs []Dirent
	for i := range 300 {
		subs = append(subs, Dirent{fmt.Sprintf("sub%d", i), dirOf()})
	}
	add("subdirs", dirOf(subs...))
	deep := dirOf(Dirent{"file", linked})
	for range 300 {
		deep = dirOf(Dirent{"d", deep})
	}
	add("deep", deep)
	// Sparse: holes at the start, between and at the end; 20 GiB and more.
	add("sparse", &Inode{Mode: modeRegular, Size: 20<<30 + 1, Extents: []Extent{{1 << 16, 0, 1 << 16}, {10 << 30, 8192, 1 << 17}, {20 << 30, 4096, 1}}})
	add("hole", &Inode{Mode: modeRegular, Size: 3 << 40})
	add("huge", &Inode{Mode: modeRegular, Size: 1<<50 + 12345, Extents: []Extent{{1 << 50, 4096, 12345}}})
	add("join", &Inode{Mode: modeRegular, Size: 5 * blk, Extents: []Extent{{0, blk, blk}, {blk, 2 * blk, 3 * blk}, {4 * blk, 5 * blk, blk}}})
	slices.SortFunc(r.Children, func(a, b Dirent) int { return -cmp.Compare(a.Name, b.Name) })
	return r
}
