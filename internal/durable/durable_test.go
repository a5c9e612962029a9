package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func check(t *testing.T, path, want string, mode fs.FileMode) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil || string(b) != want {
		t.Fatalf("%q, %v, want %q", b, err, want)
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Mode().Perm() != mode {
		t.Errorf("mode %v, %v, want %v", fi.Mode(), err, mode)
	}
	if all, err := os.ReadDir(filepath.Dir(path)); err != nil || len(all) != 1 {
		t.Errorf("the directory has %v, %v", all, err)
	}
}

func TestReplace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := Replace(path, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	check(t, path, "old", 0o644)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Replace(path, []byte("newer"), 0o600); err != nil {
		t.Fatal(err)
	}
	check(t, path, "newer", 0o600)
	b := make([]byte, 8)
	if n, _ := f.Read(b); string(b[:n]) != "old" {
		t.Errorf("a reader of the old file has %q", b[:n])
	}
}

// What exists is not touched, a dangling link neither.
func TestCreate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := Create(path, []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Create(path, []byte("second"), 0o644); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	check(t, path, "first", 0o600)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("nothing", link); err != nil {
		t.Fatal(err)
	}
	if err := Create(link, []byte("x"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
}

// A file that cannot get its name leaves nothing behind.
func TestFails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Replace(path, []byte("x"), 0o600); err == nil {
		t.Error("replaced a directory")
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 1 {
		t.Errorf("the directory has %v, %v", all, err)
	}
	if err := Replace(filepath.Join(dir, "missing", "f"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := Replace(path, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	left, err := os.CreateTemp(dir, ".f-*") // as in write
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(left.Close(), Sweep(dir)); err != nil {
		t.Fatal(err)
	}
	check(t, path, "kept", 0o600)
}
