package mount

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestReplace: another mount takes the place of one that is in use, wherever its
// directory passes mounts on to, and the old one's users keep it.
func TestReplace(t *testing.T) {
	needRoot(t)
	for name, o := range map[string]Options{"file": {}, "loop": {Loop: true}} {
		for propagation, flag := range map[string]uintptr{"private": unix.MS_PRIVATE, "shared": unix.MS_SHARED} {
			t.Run(name+" "+propagation, func(t *testing.T) {
				base := t.TempDir()
				if err := unix.Mount(base, base, "", unix.MS_BIND, ""); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = Detach(base) })
				if err := unix.Mount("", base, "", flag, ""); err != nil {
					t.Fatal(err)
				}
				meta, data, content := image(t, base)
				other := filepath.Join(base, "other")
				changed := bytes.Clone(content)
				slices.Reverse(changed)
				if err := os.WriteFile(other, changed, 0o600); err != nil {
					t.Fatal(err)
				}
				dir := mkdir(t, base, "dir")
				t.Cleanup(func() { _ = Detach(dir) })
				if _, err := Mount(meta, data, dir, o); err != nil {
					t.Fatal(err)
				}
				old, err := os.Open(filepath.Join(dir, "file"))
				if err != nil {
					t.Fatal(err)
				}
				defer old.Close()
				before := Serial(dir)
				if err := Replace(meta, other, dir, o); err != nil {
					t.Fatal(err)
				}
				if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(got, changed) {
					t.Errorf("what is mounted now: %v, or the old bytes", err)
				}
				got := make([]byte, len(content))
				if _, err := old.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
					t.Errorf("what was open before: %v, or other bytes", err)
				}
				if found, err := List(dir); err != nil || len(found) != 1 {
					t.Errorf("mounted: %+v, %v", found, err)
				}
				if now := Serial(dir); before != 0 && now <= before {
					t.Errorf("serial %d, before %d", now, before)
				}
			})
		}
	}
}

// TestReplaceFails: what cannot be mounted leaves what is.
func TestReplaceFails(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	meta, data, content := image(t, base)
	dir := mkdir(t, base, "dir")
	t.Cleanup(func() { _ = Detach(dir) })
	if _, err := Mount(meta, data, dir, Options{}); err != nil {
		t.Fatal(err)
	}
	for name, paths := range map[string][2]string{
		"no data":     {meta, filepath.Join(base, "nothing")},
		"no metadata": {filepath.Join(base, "nothing"), data},
		"no image":    {data, data},
	} {
		if err := Replace(paths[0], paths[1], dir, Options{}); err == nil {
			t.Errorf("%s: mounted", name)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: %v, or other bytes", name, err)
		}
	}
	if n, err := Switch(filepath.Join(base, "nothing"), data); n != 0 || err != nil {
		t.Errorf("switched %d devices that are not there: %v", n, err)
	}
}

func TestLowerDirs(t *testing.T) {
	for options, want := range map[string][]string{
		"rw,lowerdir=/r/m/b:/r/m/a,upperdir=/r/s/1/fs,workdir=/r/s/1/work": {"/r/m/b", "/r/m/a"},
		"rw,lowerdir+=/r/m/b,lowerdir+=a,uuid=on":                          {"/r/m/b", "a"},
		"rw,upperdir=/x": nil,
	} {
		if got := lowerDirs(options); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", options, got, want)
		}
	}
	for lower, want := range map[string]bool{"/r/m/abc": true, "abc": true, "m/abc": true, "/q/m/abc": false, "/r/m/abcd": false} {
		if got := (User{Lower: []string{"/r/s/1/fs", lower}}).Uses("/r/diffs/x/meta", "/r/m/abc"); got != want {
			t.Errorf("%s: %v", lower, got)
		}
	}
}
