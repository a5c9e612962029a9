package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/erofs"
)

// scanTree is Build up to the tree, which Build itself only writes.
func scanTree(diff []byte, o Options) (*tree, error) {
	var tr *tree
	err := withScanner(diff, o, func(s *scanner) error { tr = s.tree; return s.run() })
	return tr, err
}

func withScanner(diff []byte, o Options, f func(*scanner) error) error {
	o.setDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	in := newInput(ctx)
	out, err := newOutput(ctx, func(context.Context, blockdev.Digest, []byte) error { return nil }, Options{Workers: 1, MaxChunks: 1 << 20})
	if err != nil {
		return err
	}
	done := make(chan error, 3)
	go func() { done <- in.read(bytes.NewReader(diff)) }()
	go func() { in.hash(); done <- nil }()
	go func() { done <- out.work() }()
	err = f(&scanner{in: in, out: out, tree: newTree(o), maxInline: o.MaxInline})
	close(out.jobs)
	cancel()
	for range cap(done) {
		<-done
	}
	return err
}

// list describes a tree, a line an inode.
func list(tr *tree) string {
	var b strings.Builder
	seen := map[*erofs.Inode]string{}
	var walk func(name string, in *erofs.Inode)
	walk = func(name string, in *erofs.Inode) {
		fmt.Fprintf(&b, "%s", name)
		if first, ok := seen[in]; ok {
			fmt.Fprintf(&b, " = %s\n", first)
			return
		}
		seen[in] = name
		fmt.Fprintf(&b, " %o %d:%d %d.%d", in.Mode, in.UID, in.GID, in.MtimeSec, in.MtimeNsec)
		if in.Rdev != 0 {
			fmt.Fprintf(&b, " dev %#x", in.Rdev)
		}
		if in.Mode&modeType == modeRegular {
			fmt.Fprintf(&b, " size %d", in.Size)
		}
		for _, e := range in.Extents {
			fmt.Fprintf(&b, " [%d+%d at %d]", e.Offset, e.Length, e.DiffOffset)
		}
		if in.Inline != nil {
			fmt.Fprintf(&b, " %q", in.Inline)
		}
		for _, x := range in.Xattrs {
			fmt.Fprintf(&b, " %s=%q", x.Name, x.Value)
		}
		if d := tr.dirs[in]; d != nil && d.implied {
			b.WriteString(" implied")
		}
		b.WriteByte('\n')
		kids := append([]erofs.Dirent(nil), in.Children...)
		sortDirents(kids)
		for _, c := range kids {
			walk(name+"/"+c.Name, c.Inode)
		}
	}
	walk("", tr.root)
	return b.String()
}

func sortDirents(d []erofs.Dirent) {
	for i := range d {
		for j := i; j > 0 && d[j].Name < d[j-1].Name; j-- {
			d[j], d[j-1] = d[j-1], d[j]
		}
	}
}

var long = strings.Repeat("n", 120) + "/" + strings.Repeat("m", 200)

func acl(items ...[3]uint32) string {
	b := []byte{aclVersion, 0, 0, 0}
	for _, e := range items {
		b = append(b, byte(e[0]), 0, byte(e[1]), 0, byte(e[2]), byte(e[2]>>8), byte(e[2]>>16), byte(e[2]>>24))
	}
	return string(b)
}

var (
	someACL    = acl([3]uint32{1, 7, 9}, [3]uint32{2, 5, 1000}, [3]uint32{4, 5, 9}, [3]uint32{16, 7, 0}, [3]uint32{32, 1, 0})
	minimalACL = acl([3]uint32{1, 7, 0}, [3]uint32{4, 5, 0}, [3]uint32{32, 1, 0})
	someCap    = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
)

// oldSparse is a file in the format that GNU tar had before PAX.
func oldSparse(name string) entry {
	return entry{name: name, format: "old", realSize: 10_000, sparse: []part{{512, 512}, {4096, 100}}, data: strings.Repeat("o", 612)}
}

func xattrs(e entry, kv ...string) entry {
	for i := 0; i < len(kv); i += 2 {
		e.pax = append(e.pax, [2]string{paxXattr + kv[i], kv[i+1]})
	}
	return e
}

func at(e entry, sec, nsec int64) entry { e.mtime = time.Unix(sec, nsec); return e }

// trees that are accepted, as they should come out. The comparison with
// containerd and the kernel is in containerd_test.go; these run without root.
var trees = []struct {
	name    string
	entries []entry
	want    string
}{
	{"empty", nil, " 40755 0:0 0.0\n"},
	{"root entry", []entry{{typ: tar.TypeDir, name: "./", mode: 0o700, uid: 5}, {typ: tar.TypeDir, name: "/", mode: 0}}, " 40755 0:0 0.0\n"},
	{"names", []entry{dirEntry("./a//b/../c/"), file("/a/c/f", "x"), {typ: 0, name: long, gnuLong: true}, {name: long + "2", data: "y"}}, "" +
		" 40755 0:0 0.0\n/a 40755 0:0 0.0 implied\n/a/c 40755 0:0 0.0\n/a/c/f 100644 0:0 0.0 size 1 [0+1 at 1024]\n" +
		"/" + long[:120] + " 40755 0:0 0.0 implied\n/" + long + " 100000 0:0 0.0 size 0\n/" + long + "2 100000 0:0 0.0 size 1 [0+1 at 4608]\n"},
	{"attributes", []entry{
		{name: "f", mode: 0o106755, uid: 1 << 31, gid: 70000, data: "abc", mtime: time.Unix(1, 5)},
		{typ: tar.TypeDir, name: "t", mode: 0o1777, mtime: time.Unix(-5, 0)},
		{name: "n", mtime: time.Unix(-5, 7)},
		{name: "minus", uid: -1, gid: -2},
		{typ: tar.TypeChar, name: "c", major: 4095, minor: 0xfffff, mode: 0o666},
		{typ: tar.TypeBlock, name: "b", major: 8, minor: 1, size: 99},
		{typ: tar.TypeFifo, name: "p", mode: 0o644, major: 3},
	}, "" +
		" 40755 0:0 0.0\n/b 60000 0:0 0.0 dev 0x801\n/c 20666 0:0 0.0 dev 0xffffffff\n" +
		"/f 106755 2147483648:70000 1.5 size 3 [0+3 at 1536]\n/minus 100000 0:4294967294 0.0 size 0\n/n 100000 0:0 0.0 size 0\n/p 10644 0:0 0.0\n/t 41777 0:0 0.0\n"},
	{"hard links", []entry{file("a", "1"), {typ: tar.TypeLink, name: "b", link: "./a", mode: 0o4711, uid: 3, mtime: time.Unix(9, 0)}, file("a", "2"), hardlink("d/c", "/b")}, "" +
		" 40755 0:0 0.0\n/a 100644 0:0 0.0 size 1 [0+1 at 2048]\n/b 100600 0:0 0.0 size 1 [0+1 at 512]\n/d 40755 0:0 0.0 implied\n/d/c = /b\n"},
	{"capability goes with the owner", []entry{xattrs(file("a", ""), "security.capability", someCap), xattrs(file("k", ""), "security.capability", someCap), hardlink("b", "a")}, "" +
		" 40755 0:0 0.0\n/a 100600 0:0 0.0 size 0\n/b = /a\n/k 100644 0:0 0.0 size 0 security.capability=" + fmt.Sprintf("%q", someCap) + "\n"},
	{"duplicates", []entry{dirEntry("a"), file("a/x", "1"), at(entry{typ: tar.TypeDir, name: "a", mode: 0o700}, 7, 0), file("b", "1"), dirEntry("b"), symlink("c", "q"), file("c", "")}, "" +
		" 40755 0:0 0.0\n/a 40700 0:0 7.0\n/a/x 100644 0:0 0.0 size 1 [0+1 at 1024]\n/b 40755 0:0 0.0\n/c 100644 0:0 0.0 size 0\n"},
	{"whiteouts", []entry{{name: "d/.wh.x", uid: 4, mode: 0o644, data: "junk", mtime: time.Unix(3, 0)}, file("e/.wh..wh..opq", ""), file(".wh..wh.plnk", ""), file(".wh.y", ""), file("y", "")}, "" +
		" 40755 0:0 0.0\n/.wh.plnk 20000 0:0 0.0\n/d 40755 0:0 0.0 implied\n/d/x 20000 4:0 3.0\n/e 40755 0:0 0.0 trusted.overlay.opaque=\"y\" implied\n/y 100644 0:0 0.0 size 0\n"},
	{"through symlinks", []entry{dirEntry("usr/bin"), symlink("bin", "usr/bin"), symlink("usr/up", "../usr"), file("bin/sh", ""), file("usr/up/x", ""), hardlink("bin/l", "usr/up/x"), hardlink("m", "/bin/sh//")}, "" +
		" 40755 0:0 0.0\n/bin 120777 0:0 0.0 \"usr/bin\"\n/m 100600 0:0 0.0 size 0\n/usr 40755 0:0 0.0 implied\n/usr/bin 40755 0:0 0.0\n/usr/bin/l 100600 0:0 0.0 size 0\n/usr/bin/sh = /m\n/usr/up 120777 0:0 0.0 \"../usr\"\n/usr/x = /usr/bin/l\n"},
	{"a directory's time goes to what replaced it", []entry{at(dirEntry("d"), 5, 0), at(file("d", ""), 6, 0)}, " 40755 0:0 0.0\n/d 100644 0:0 5.0 size 0\n"},
	{"attributes that are passed over", []entry{
		xattrs(file("f", ""), "trusted.x", "1", "system.x", "1", "lustre.x", "1", "user.u", "", "security.s", "2"),
		xattrs(symlink("l", "f"), "user.u", "1", xattrACL, someACL, "security.s", "2"),
	}, "" +
		" 40755 0:0 0.0\n/f 100644 0:0 0.0 size 0 security.s=\"2\" user.u=\"\"\n/l 120777 0:0 0.0 \"f\" security.s=\"2\"\n"},
	{"ACLs", []entry{
		{typ: tar.TypeDir, name: "d", mode: 0o750, pax: [][2]string{{paxXattr + xattrDefaultACL, someACL}}},
		file("d/f", ""),
		xattrs(file("m", ""), xattrACL, minimalACL),
	}, "" +
		" 40755 0:0 0.0\n/d 40750 0:0 0.0 system.posix_acl_default=" +
		fmt.Sprintf("%q", acl([3]uint32{1, 7, aclNoID}, [3]uint32{2, 5, 1000}, [3]uint32{4, 5, aclNoID}, [3]uint32{16, 7, aclNoID}, [3]uint32{32, 1, aclNoID})) +
		"\n/d/f 100644 0:0 0.0 size 0 system.posix_acl_access=" +
		fmt.Sprintf("%q", acl([3]uint32{1, 6, aclNoID}, [3]uint32{2, 5, 1000}, [3]uint32{4, 5, aclNoID}, [3]uint32{16, 4, aclNoID}, [3]uint32{32, 4, aclNoID})) +
		"\n/m 100644 0:0 0.0 size 0\n"},
	{"set-group-ID directories", []entry{{typ: tar.TypeDir, name: "d", mode: 0o2755, gid: 42}, file("d/i/f", "")}, "" +
		" 40755 0:0 0.0\n/d 42755 0:42 0.0\n/d/i 40755 0:42 0.0 implied\n/d/i/f 100644 0:0 0.0 size 0\n"},
	{"sparse", []entry{
		{name: "a", format: "0.0", realSize: 3000, sparse: []part{{1024, 700}}, data: strings.Repeat("a", 700)},
		{name: "b", format: "0.1", realSize: 4096, sparse: []part{{0, 512}, {512, 512}, {4096, 0}}, data: strings.Repeat("b", 1024)},
		{name: "c", format: "1.0", realSize: 2000, sparse: []part{{1536, 464}}, data: strings.Repeat("c", 464)},
		{name: "odd", format: "1.0", realSize: 9, sparse: []part{{1, 2}, {5, 2}}, data: "dEfg"},
		{name: "hole", format: "0.1", realSize: 1 << 33},
	}, "" +
		" 40755 0:0 0.0\n/a 100000 0:0 0.0 size 3000 [1024+1024 at 1536]\n/b 100000 0:0 0.0 size 4096 [0+1024 at 4096]\n" +
		"/c 100000 0:0 0.0 size 2000 [1536+464 at 7168]\n/hole 100000 0:0 0.0 size 8589934592\n/odd 100000 0:0 0.0 size 9 \"\\x00dE\\x00\\x00fg\\x00\\x00\"\n"},
	{"global header", []entry{file("g", "x"), {typ: tar.TypeXGlobalHeader, name: "g", data: paxRecord("comment", "c")}, file("f", "")}, "" +
		" 40755 0:0 0.0\n/f 100644 0:0 0.0 size 0\n"},
}

func TestTrees(t *testing.T) {
	for _, tt := range trees {
		t.Run(tt.name, func(t *testing.T) {
			diff := makeTar(tt.entries...)
			tr, err := scanTree(diff, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if got := list(tr); got != tt.want {
				t.Errorf("tree:\n%swant:\n%s", got, tt.want)
			}
			if tt.name == "sparse" {
				return // the chunk map of 1 TiB has no room in EROFS
			}
			if _, _, err := roundTrip(t, diff, Options{}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestImplied(t *testing.T) {
	diff := makeTar(file("b/c/f", ""), file("a/f", ""), dirEntry("a"), file("z/f", ""), file("z", ""))
	ix, _, err := roundTrip(t, diff, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"b", "b/c"}; !reflect.DeepEqual(ix.Implied, want) {
		t.Errorf("implied %q, want %q", ix.Implied, want)
	}
}

func TestRefused(t *testing.T) {
	whole := makeTar(file("dir/name", strings.Repeat("x", 5000)))
	broken := bytes.Clone(whole)
	broken[3] ^= 1
	deep := strings.Repeat("d/", 2047) + "f"
	tests := []struct {
		name string
		diff []byte
		want error
		say  string
	}{
		{"truncated content", whole[:2000], blockdev.ErrCorrupt, `"dir/name"`},
		{"truncated header", whole[:300], blockdev.ErrCorrupt, "byte 0"},
		{"checksum", broken, blockdev.ErrCorrupt, "byte 0"},
		{"no tar", []byte(strings.Repeat("no tar at all. ", 100)), blockdev.ErrCorrupt, "byte 0"},
		{"one zero block", append(make([]byte, 512), whole...), blockdev.ErrCorrupt, "byte 0"},
		{"terabytes", makeTar(entry{name: "big", size: 1 << 50, data: "x"}), blockdev.ErrCorrupt, `"big"`},
		{"leaves the root", makeTar(file("a/../../b", "")), blockdev.ErrUnsupported, "leaves the root"},
		{"link leaves the root", makeTar(hardlink("a", "../../etc/passwd")), blockdev.ErrUnsupported, "leaves the root"},
		{"link to nothing", makeTar(hardlink("a", "b")), blockdev.ErrUnsupported, "not in this layer"},
		{"link to itself", makeTar(file("a", ""), hardlink("a", "a")), blockdev.ErrUnsupported, "not in this layer"},
		{"link below a file", makeTar(file("d", ""), hardlink("a", "d/e")), blockdev.ErrUnsupported, "not a directory"},
		{"link to a directory's parent", makeTar(dirEntry("d/e"), hardlink("a", "d/e/..")), blockdev.ErrUnsupported, "directory"},
		{"link to directory", makeTar(dirEntry("d"), hardlink("a", "d")), blockdev.ErrUnsupported, "directory"},
		{"file as parent", makeTar(file("a", ""), file("a/b", "")), blockdev.ErrUnsupported, "not a directory"},
		{"symlink loop", makeTar(symlink("a", "b"), symlink("b", "a"), file("a/x", "")), blockdev.ErrUnsupported, "symlinks"},
		{"whiteout of own file", makeTar(file("a", ""), file(".wh.a", "")), blockdev.ErrUnsupported, "whiteout"},
		{"whiteout without a name", makeTar(file("a/.wh.", "")), blockdev.ErrUnsupported, "whiteout"},
		{"whiteout of the parent", makeTar(file("a/.wh...", "")), blockdev.ErrUnsupported, "whiteout"},
		{"long name", makeTar(file(strings.Repeat("n", 256), "")), blockdev.ErrUnsupported, "256"},
		{"long path", makeTar(file(deep+"d", "")), blockdev.ErrUnsupported, "4096"},
		{"long path over links", makeTar(symlink("l", strings.Repeat("d/", 2000)), file("l/"+strings.Repeat("e/", 100)+"f", "")), blockdev.ErrUnsupported, "path"},
		{"empty symlink", makeTar(symlink("a", "")), blockdev.ErrUnsupported, "symlink"},
		{"old GNU sparse", makeTar(oldSparse("a")), blockdev.ErrUnsupported, "type 'S'"},
		{"unknown type", makeTar(entry{typ: '7', name: "a"}), blockdev.ErrUnsupported, "type"},
		{"PAX header", makeTar(xattrs(file("a", ""), "user.x", strings.Repeat("x", 1<<20))), blockdev.ErrUnsupported, "byte 0"},
		{"many PAX headers", bytes.Repeat(func() []byte {
			var b bytes.Buffer
			special(&b, tar.TypeXHeader, "ustar\x0000", strings.Repeat(paxRecord("comment", strings.Repeat("x", 1000)), 1000))
			return b.Bytes()
		}(), 5), blockdev.ErrUnsupported, "headers before one entry"},
		{"attribute value", makeTar(xattrs(file("a", ""), "user.x", strings.Repeat("x", 1<<16))), blockdev.ErrUnsupported, "user.x"},
		{"attribute name", makeTar(xattrs(file("a", ""), "user.", "x")), blockdev.ErrUnsupported, "user."},
		{"capability", makeTar(xattrs(file("a", ""), xattrCapability, "x")), blockdev.ErrUnsupported, xattrCapability},
		{"ACL", makeTar(xattrs(file("a", ""), xattrACL, someACL[:20])), blockdev.ErrUnsupported, "ACL"},
		{"default ACL of a file", makeTar(xattrs(file("a", ""), xattrDefaultACL, someACL)), blockdev.ErrUnsupported, "not a directory"},
		{"sparse, more data than placed", makeTar(entry{name: "a", format: "0.1", realSize: 9, sparse: []part{{1, 2}}, data: "abc"}), blockdev.ErrCorrupt, `"a"`},
		{"sparse, less data than placed", makeTar(entry{name: "a", format: "1.0", realSize: 9, sparse: []part{{1, 2}}, data: "a"}), blockdev.ErrCorrupt, `"a"`},
		{"sparse and odd", makeTar(entry{name: "a", format: "0.1", realSize: 1 << 40, sparse: []part{{1, 2}}, data: "ab"}), blockdev.ErrUnsupported, "across blocks"},
		{"directory replaced under its children's times", makeTar(dirEntry("a/b"), file("a", "")), blockdev.ErrUnsupported, "a/b"},
		{"directory replaced by a dangling link", makeTar(dirEntry("a"), symlink("a", "nowhere")), blockdev.ErrUnsupported, "symlink to nothing"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Build(t.Context(), bytes.NewReader(tt.diff), newMemory().put, Options{})
			if !errors.Is(err, tt.want) || !strings.Contains(fmt.Sprint(err), tt.say) {
				t.Errorf("error %v; want %v that says %q", err, tt.want, tt.say)
			}
		})
	}
}

// What ends a tar early without harm, or follows it.
func TestEnds(t *testing.T) {
	whole := makeTar(file("f", "content"))
	for name, diff := range map[string][]byte{
		"no bytes at all":      {},
		"no end":               whole[:1024],
		"one block of the end": whole[:1536],
		"no padding":           whole[:512+7],
		"part of the padding":  whole[:700],
		"end only":             make([]byte, 1024),
		"garbage behind":       append(bytes.Clone(whole), "garbage, of an odd length"...),
		"much padding":         append(bytes.Clone(whole), make([]byte, 1<<20)...),
		"lost PAX header": append(bytes.Clone(whole[:1024]), func() []byte {
			var b bytes.Buffer
			special(&b, tar.TypeXHeader, "ustar\x0000", paxRecord("path", "x"))
			return b.Bytes()
		}()...),
	} {
		t.Run(name, func(t *testing.T) {
			ix, masked, err := roundTrip(t, diff, Options{})
			if err != nil {
				t.Fatal(err)
			}
			want := make([]byte, len(diff))
			if len(want) > 512 && name != "end only" {
				copy(want[512:], "content")
			}
			if !bytes.Equal(masked, want) {
				t.Error("masked diff is not the content alone")
			}
			if len(diff) == 0 && (len(ix.Chunks) > 0 || len(ix.Headers) > 0) {
				t.Error("an empty diff has chunks or headers")
			}
		})
	}
}

func TestLimits(t *testing.T) {
	var many []entry
	for i := range 200 {
		many = append(many, file(fmt.Sprintf("d/%0100d", i), ""))
	}
	for name, o := range map[string]Options{"entries": {MaxEntries: 150}, "inodes": {MaxEntries: 350}, "bytes": {MaxMetadata: 15_000}} {
		if _, err := Build(t.Context(), bytes.NewReader(makeTar(many...)), newMemory().put, o); !errors.Is(err, blockdev.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Build(t.Context(), bytes.NewReader(makeTar(many...)), newMemory().put, Options{MaxEntries: 402}); err != nil {
		t.Error(err)
	}
	large := makeTar(file("large", string(randomBytes(1, 8*blockdev.MaxChunk))))
	if _, err := Build(t.Context(), bytes.NewReader(large), newMemory().put, Options{MaxChunks: 4}); !errors.Is(err, blockdev.ErrUnsupported) || !strings.Contains(err.Error(), "divide the layer") {
		t.Errorf("chunks: %v", err)
	}
	// A default ACL goes to all children, and is paid for each time.
	big := acl([3]uint32{1, 7, 0})
	for i := range uint32(7000) {
		big += acl([3]uint32{2, 7, i})[4:]
	}
	big += acl([3]uint32{4, 7, 0}, [3]uint32{16, 7, 0}, [3]uint32{32, 7, 0})[4:]
	many = append([]entry{xattrs(dirEntry("d"), xattrDefaultACL, big)}, many...)
	if _, err := Build(t.Context(), bytes.NewReader(makeTar(many...)), newMemory().put, Options{MaxMetadata: 10 << 20}); !errors.Is(err, blockdev.ErrUnsupported) {
		t.Errorf("inherited ACLs: %v", err)
	}
}

// Neither the size of reads nor the number of workers changes a bit.
func TestDeterminism(t *testing.T) {
	big := makeTar(file("big", string(randomBytes(1, 3<<20))))
	diff := append(big[:len(big)-1024], randomTar(rand.New(rand.NewPCG(3, 3)), 300, false)...)
	first, _, err := roundTrip(t, diff, Options{Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		got, err := Build(t.Context(), oneByte(diff), newMemory().put, Options{Workers: 5})
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, first) {
			t.Fatal("another index for the same diff")
		}
	}
}

// errBroken is as clients report a connection that ended too early: it wraps
// io.EOF, and is no end.
var errBroken = fmt.Errorf("connection lost: %w", io.EOF)

func TestErrorsOfOthers(t *testing.T) {
	diff := makeTar(file("f", string(randomBytes(2, 4<<20))))
	boom := errors.New("boom")
	bad := func(context.Context, blockdev.Digest, []byte) error { return boom }
	if _, err := Build(t.Context(), bytes.NewReader(diff), bad, Options{}); !errors.Is(err, boom) {
		t.Errorf("error of put: %v", err)
	}
	for _, fails := range []error{boom, errBroken} {
		for _, n := range []int{0, 1 << 20, len(diff) - 1000, len(diff)} { // start, content, end of the archive, behind it
			r := &failing{r: bytes.NewReader(diff[:n]), err: fails}
			if _, err := Build(t.Context(), r, newMemory().put, Options{}); !errors.Is(err, fails) || errors.Is(err, blockdev.ErrCorrupt) {
				t.Errorf("error of the reader at %d: %v", n, err)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	stop := func(context.Context, blockdev.Digest, []byte) error { cancel(); return nil }
	if _, err := Build(ctx, bytes.NewReader(diff), stop, Options{Workers: 1}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

type failing struct {
	r   *bytes.Reader
	err error
}

func (f *failing) Read(p []byte) (int, error) {
	if f.r.Len() == 0 {
		return 0, f.err
	}
	return f.r.Read(p)
}

func randomBytes(seed byte, n int) []byte {
	b := make([]byte, n)
	if _, err := rand.NewChaCha8([32]byte{seed}).Read(b); err != nil {
		panic(err)
	}
	return b
}
