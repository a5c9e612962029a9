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
