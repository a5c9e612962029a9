package registry

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// TestCacheCountsBlocks: what tags name is 71 bytes each and takes a block and an
// inode; the bounds are on what the disk has less, and also after a restart.
func TestCacheCountsBlocks(t *testing.T) {
	dir := t.TempDir()
	c, err := openCache(dir, 10*block)
	if err != nil {
		t.Fatal(err)
	}
	put := func(n int) {
		t.Helper()
		for i := range n {
			if err := c.putTag(Reference{Host: "r.example", Repository: "a", Tag: fmt.Sprint("v", i)}, blockdev.Sum(nil)); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := func(what string, most int) {
		t.Helper()
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var used int64
		for _, e := range entries {
			fi, err := os.Stat(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			used += fi.Sys().(*syscall.Stat_t).Blocks * 512
		}
		if len(entries) != most || used > 10*block {
			t.Errorf("%s: %d files that take %d bytes, want %d", what, len(entries), used, most)
		}
	}
	put(50)
	want("many tags", 10)
	if c, err = openCache(dir, 5*block); err != nil {
		t.Fatal(err)
	}
	want("a smaller quota", 5)
	c.limit, c.most = 100*block, 7
	put(50)
	want("inodes", 7)
}

// TestCacheIsShared: a host that has much to keep pushes out its own, at whichever port, also after
// a restart; what others have, and what has just come, stays.
func TestCacheIsShared(t *testing.T) {
	dir := t.TempDir()
	c, err := openCache(dir, 20*block)
	if err != nil {
		t.Fatal(err)
	}
	doc := func(host string, i int) (string, blockdev.Digest, []byte) {
		b := fmt.Appendf(nil, "document %d of %s", i, host)
		return host + "/app", blockdev.Sum(b), b
	}
	put := func(host string, i int) {
		t.Helper()
		if err := c.putDoc(doc(host, i)); err != nil {
			t.Fatal(err)
		}
	}
	has := func(host string, i int) bool {
		name, d, _ := doc(host, i)
		_, ok := c.doc(name, d, 1000)
		return ok
	}
	for i := range 5 {
		put("honest.example", i)
	}
	for i := range 200 {
		if i == 100 {
			if c, err = openCache(dir, 20*block); err != nil {
				t.Fatal(err)
			}
		}
		host := fmt.Sprint("evil.example:", 1000+i%50)
		put(host, i)
		if !has(host, i) {
			t.Fatal("what has just come is gone")
		}
	}
	for i := range 5 {
		if !has("honest.example", i) {
			t.Errorf("another host pushed out document %d", i)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 20 {
		t.Errorf("%d files, %v", len(entries), err)
	}
	// A file that is alone is not the one that makes room for itself.
	big := make([]byte, 12*block)
	if err := c.putDoc("big.example/app", blockdev.Sum(big), big); err != nil {
		t.Fatal(err)
	}
	if _, ok := c.doc("big.example/app", blockdev.Sum(big), 1<<20); !ok || c.bytes > c.limit {
		t.Errorf("kept: %t, with %d bytes", ok, c.bytes)
	}
}
