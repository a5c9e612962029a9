package store

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/boltcheck"
)

// TestCheckedAfterUncleanEnd: an index.db that was closed in good order is not read as a
// whole at the next start, and one that was not is, as is one that has shown damage.
func TestCheckedAfterUncleanEnd(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "index.db")
	sealed := func() bool {
		t.Helper()
		is, err := boltcheck.Sealed(path)
		if err != nil {
			t.Fatal(err)
		}
		return is
	}
	s := open(t, Config{Dir: dir})
	l := newLayer(1, 5)
	publish(t, s, l)
	// What a kill leaves.
	killed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	shut(t, s)
	if !sealed() {
		t.Error("a clean end is not written down")
	}
	checkAccounts(t, dir)
	s = open(t, Config{Dir: dir})
	check(t, s, l)
	shut(t, s)
	if err := os.WriteFile(path, killed, 0o600); err != nil {
		t.Fatal(err)
	}
	if sealed() {
		t.Error("the end was unclean and counts as clean")
	}
	s = open(t, Config{Dir: dir})
	check(t, s, l)
	err = s.db.guard(func() error { panic("a page is not what it should be") })
	if err == nil || !s.db.doubtful.Load() {
		t.Fatalf("damage is not noticed: %v", err)
	}
	shut(t, s)
	if sealed() {
		t.Error("the index has shown damage, and the next start would not look at it")
	}
}

// TestDamagedAtRest: a disk that has changed an index.db since its clean end: a check finds
// it, and the next start begins anew.
func TestDamagedAtRest(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir, Idle: -1})
	l := indexed(t, newLayer(1, 300)) // more than a page of records
	publish(t, s, l)
	path := dbPath(s.cfg.Dir)
	shut(t, s)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	d := blockdev.Sum(l.chunks[7])
	damaged := bytes.Clone(d[:])
	damaged[0] ^= 0x80 // the key is out of order
	if err := os.WriteFile(path, bytes.ReplaceAll(data, d[:], damaged), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Dir: dir, Idle: -1})
	if h := storeCheck(t, s, false); len(h.Findings) == 0 {
		t.Fatal("a check finds nothing")
	}
	shut(t, s)
	s = open(t, Config{Dir: dir, Idle: -1})
	checkGone(t, s, l)
	publish(t, s, l)
	check(t, s, l)
}
