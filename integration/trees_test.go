package integration

import (
	"archive/tar"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// bigContent is longer than a chunk and does not compress to nothing.
func bigContent(seed int) string {
	var b strings.Builder
	for i := 0; b.Len() < 700<<10; i++ {
		fmt.Fprintf(&b, "%d:%d\n", seed*7919+i, i*i)
	}
	return b.String()
}

// TestTrees compares what shoal mounts with what containerd's overlayfs
// unpacks, entry by entry, for layers that have everything a tar can hold.
func TestTrees(t *testing.T) {
	s := newSite(t, "")
	base := layer(t,
		dir("bin/"), file("bin/true", "#!"), dir("etc/"), file("etc/passwd", "root:x:0:0::/:/bin/sh\n"),
		dir("opt/"), dir("opt/a/").with(func(h *tar.Header) { h.Mode = 0o1750; h.Uid = 12; h.Gid = 34 }),
		file("opt/a/one", "1"), file("opt/a/two", bigContent(1)), dir("opt/b/"), file("opt/b/gone", "x"),
		dir("var/"), dir("var/empty/"),
	)
	many := make([]lab.Blob, 0, 127)
	for i := range 127 {
		many = append(many, layer(t, dir("l/"), file(fmt.Sprintf("l/%03d", i), bigContent(i)[:4000+i])))
	}
	images := map[string][]lab.Blob{
		"plain":      {base, layer(t, file("only", "here"))}, // a chain of its own, so that it is asked for
		"raw":        {lab.PlainLayer(makeTar(t, dir("d/"), file("d/f", bigContent(3))))},
		"duplicates": {base, base, layer(t, file("etc/new", "n")), base},
		"empty":      {base, layer(t), lab.PlainLayer(make([]byte, 1024)), layer(t)},
		"layers127":  many,
		"whiteouts": {base, layer(t, dir("opt/"), file("opt/b/.wh.gone", ""), dir("opt/a/"), file("opt/a/.wh..wh..opq", ""),
			file("opt/a/new", "new"), file("var/.wh.empty", ""))},
		"parents": {base, layer(t, file("opt/a/deep/er/file", "f"), file("new/dirs/file", "g"), file("var/empty/x", "x"))},
		"links": {layer(t, dir("d/"), file("d/a", bigContent(5)), link("d/b", "d/a"), link("c", "/d/a"), symlink("d/s", "../c"),
			symlink("abs", "/d/a"), symlink("dangling", "nowhere"), file("d/a", "replaced"))},
		"types": {layer(t, dir("./"), dir("./dev/"),
			entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "./dev/null", Mode: 0o666, Devmajor: 1, Devminor: 3, ModTime: mtime}},
			entry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "dev/sda", Mode: 0o660, Devmajor: 259, Devminor: 70000, ModTime: mtime}},
			entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "/dev/fifo", Mode: 0o600, ModTime: mtime}},
			file("suid", "s").with(func(h *tar.Header) { h.Mode = 0o6755; h.Uid = 4_000_000_000; h.Gid = 70000 }),
			file("ns", "t").with(func(h *tar.Header) { h.ModTime = time.Unix(1700000000, 123456789) }),
			file("before1970", "t").with(func(h *tar.Header) { h.ModTime = time.Unix(-1000, 5) }),
			file("zero", ""),
		)},
		"xattrs": {layer(t, dir("d/"),
			file("d/cap", "c").with(func(h *tar.Header) {
				h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}
			}),
			file("d/user", "u").with(func(h *tar.Header) {
				h.PAXRecords = map[string]string{"SCHILY.xattr.user.a": "1", "SCHILY.xattr.user.bb": "22", "SCHILY.xattr.user.ccc": ""}
			}),
			dir("d/acl/").with(func(h *tar.Header) {
				h.PAXRecords = map[string]string{"SCHILY.xattr.user.same": strings.Repeat("v", 300)}
			}),
			file("d/user2", bigContent(9)).with(func(h *tar.Header) {
				h.PAXRecords = map[string]string{"SCHILY.xattr.user.same": strings.Repeat("v", 300)}
			}),
		)},
		"names": {layer(t, dir("d/"), file("d/"+strings.Repeat("n", 255), "long"), file("d/"+strings.Repeat("p/", 120)+"deep", "deep"),
			file("d/ü \n\"", "odd"), file("d/twice", "first"), dir("d/kind/"), file("d/kind/in", "in"), file("d/kind", "now a file"), file("d/twice", bigContent(11)))},
	}
	// Where the last layer that touches a directory has no entry for it, containerd
	// leaves the time of unpacking. It never gives the root a time.
	timeless := map[string][]string{
		"whiteouts": {"opt/b", "var"},
		"parents":   {"opt", "opt/a", "new", "new/dirs", "opt/a/deep", "opt/a/deep/er", "var", "var/empty"},
	}
	for deep := "d/p"; len(deep) < 250; deep += "/p" {
		timeless["names"] = append(timeless["names"], deep)
	}
	for name, layers := range images {
		t.Run(name, func(t *testing.T) {
			ref := s.push(t, name, layers...)
			var views []string
			for _, snapshotter := range []string{"overlayfs", "shoal"} {
				if err := s.Pull(t.Context(), snapshotter, ref); err != nil {
					t.Fatal(err)
				}
				views = append(views, s.mountImage(t, snapshotter, ref))
			}
			if !s.isLazy(t, t.Context(), ref) {
				t.Error("the image was unpacked in the ordinary way, which compares overlayfs with itself")
			}
			for _, d := range must(lab.Differences(views[0], views[1], func(entry string) bool {
				return entry == "." || slices.Contains(timeless[name], entry)
			}))(t) {
				t.Errorf("overlayfs and shoal differ: %s", d)
			}
		})
	}
}
