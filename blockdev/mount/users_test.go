package mount

import (
	"path/filepath"
	"slices"
	"testing"
)

// TestSerial: a mount that was made later has a larger number.
func TestSerial(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	meta, data, _ := image(t, base)
	var serials []uint64
	for _, name := range []string{"a", "b"} {
		dir := mkdir(t, base, name)
		t.Cleanup(func() { _ = Detach(dir) })
		if _, err := Mount(meta, data, dir, Options{}); err != nil {
			t.Fatal(err)
		}
		serials = append(serials, Serial(dir))
	}
	if serials[0] != 0 && serials[1] <= serials[0] {
		t.Errorf("serials %d", serials)
	}
}

func TestSwitchOfNothing(t *testing.T) {
	base := t.TempDir()
	if n, err := Switch(filepath.Join(base, "nothing"), filepath.Join(base, "other")); n != 0 || err != nil {
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
	for lower, want := range map[string]bool{"/r/m/abc": true, "abc": true, "m/abc": true, "/r/m/def": true, "/q/m/abc": false, "/r/m/abcd": false} {
		if got := (User{Lower: []string{"/r/s/1/fs", lower}}).Uses("/r/diffs/x/meta", "/r/m/abc", "/r/m/def"); got != want {
			t.Errorf("%s: %v", lower, got)
		}
	}
}
