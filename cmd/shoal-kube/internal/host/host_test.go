package host

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/deploy"
)

// TestHostInstall in integration does all of it on a machine.

func newMachine(t *testing.T) *Machine {
	return &Machine{Log: slog.New(slog.DiscardHandler), Etc: t.TempDir()}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

// TestAdopt: the operator's file is kept as a copy, once, and one with another root is not
// touched.
func TestAdopt(t *testing.T) {
	m := newMachine(t)
	set := settings{Root: "/var/lib/shoal"}
	if err := m.adopt(set); err != nil {
		t.Errorf("no file: %v", err)
	}
	file := m.etc("node.toml")
	for text, want := range map[string]string{
		"root = \"/data/shoal\"\n": `root = "/data/shoal"`,
		"root = \n":                "mend the file",
	} {
		put(t, file, text)
		if err := m.adopt(set); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
		if read(t, file+copySuffix) != "" {
			t.Errorf("%q: a copy was made", text)
		}
	}
	const own = "cache_quota = \"50GiB\"\n"
	put(t, file, own)
	if err := m.adopt(set); err != nil || read(t, file+copySuffix) != own {
		t.Errorf("the copy is %q, %v", read(t, file+copySuffix), err)
	}
	if st, err := os.Stat(file + copySuffix); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the copy has not the file's mode: %v, %v", st, err)
	}
	if err := os.Remove(file); err != nil { // as it is replaced: by another file
		t.Fatal(err)
	}
	put(t, file, header+"version = 1\n")
	if err := m.adopt(set); err != nil || read(t, file+copySuffix) != own {
		t.Errorf("after the chart's file the copy is %q, %v", read(t, file+copySuffix), err)
	}
}

// TestUnitDisk: the node, and its removal, wait for the disk that has the node's directory,
// also if a symbolic link leads there.
func TestUnitDisk(t *testing.T) {
	m := newMachine(t)
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(filepath.Join(dir, "disk"), link); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "disk"), 0o700); err != nil {
		t.Fatal(err)
	}
	for root, want := range map[string]string{
		"/var/lib/shoal":                   "/var/lib/shoal",
		"/data//shoal/":                    "/data/shoal",
		`/data/a "b\c%d`:                   `"/data/a \"b\\c%%d"`,
		link:                               link + " " + filepath.Join(dir, "disk"),
		filepath.Join(link, "not/there"):   filepath.Join(link, "not/there") + " " + filepath.Join(dir, "disk/not/there"),
		filepath.Join(dir, "disk/not-yet"): filepath.Join(dir, "disk/not-yet"),
	} {
		for name, text := range map[string]string{"node": nodeUnit("/opt/shoal/bin", root), "removal": m.removeUnitText(root)} {
			if got := strings.Count(text, "RequiresMountsFor="); got != 1 || !strings.Contains(text, "\nRequiresMountsFor="+want+"\n") {
				t.Errorf("%s with root = %q: not %s:\n%s", name, root, want, text)
			}
		}
	}
	if text := nodeUnit("/opt/shoal/bin", "/data/shoal"); !strings.Contains(text, "\nExecStart=/opt/shoal/bin/shoal node ") {
		t.Errorf("the unit starts another program:\n%s", text)
	}
}

// TestReplace: what is there already is not written, and undo gives back what was there
// before, a program too.
func TestReplace(t *testing.T) {
	m := newMachine(t)
	bin := t.TempDir()
	from := filepath.Join(t.TempDir(), "shoal")
	d := Desired{Config: "version = 1\n", Token: "secret\n", BinDir: bin}
	replace := func(text string) changes {
		t.Helper()
		put(t, from, text)
		p, err := stage(from, bin)
		if err != nil {
			t.Fatal(err)
		}
		defer p.drop()
		changed, err := m.replace(m.files(d, settings{Root: deploy.NodeRoot}), p)
		if err != nil {
			t.Fatal(err)
		}
		return changed
	}
	first := replace("one")
	if len(first) < 3 || read(t, filepath.Join(bin, "shoal")) != "one" || read(t, m.etc("token")) != "secret\n" {
		t.Errorf("%d files were written", len(first))
	}
	first.forget()
	if again := replace("one"); len(again) != 0 {
		t.Errorf("another run changes %v", again)
	}
	d.Token = "other"
	second := replace("two")
	if len(second) != 2 || read(t, filepath.Join(bin, "shoal")) != "two" {
		t.Errorf("%d files were written", len(second))
	}
	if err := second.undo(); err != nil || read(t, filepath.Join(bin, "shoal")) != "one" || read(t, m.etc("token")) != "secret\n" {
		t.Errorf("after undo: %v", err)
	}
	if err := first.undo(); err != nil || read(t, filepath.Join(bin, "shoal")) != "" || read(t, m.etc("node.toml")) != "" {
		t.Errorf("after undo of the first: %v", err)
	}
	left, err := os.ReadDir(bin)
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestReplaceKilled: after an installation that ended before the node had got up, another one
// goes back to what was there before the first, if it has to.
func TestReplaceKilled(t *testing.T) {
	for _, next := range []string{"two", "three"} {
		m := newMachine(t)
		bin, from := t.TempDir(), filepath.Join(t.TempDir(), "shoal")
		replace := func(text string) changes {
			t.Helper()
			put(t, from, text)
			p, err := stage(from, bin)
			if err != nil {
				t.Fatal(err)
			}
			defer p.drop()
			changed, err := m.replace([]file{{m.etc("node.toml"), []byte(text), 0o644}, {m.etc("token"), []byte("secret"), 0o600}}, p)
			if err != nil {
				t.Fatal(err)
			}
			return changed
		}
		replace("one").forget()
		replace("two")
		changed := replace(next)
		if len(changed) != 2 || read(t, m.etc("node.toml")) != next {
			t.Errorf("%s: %v", next, changed)
		}
		if err := changed.undo(); err != nil || read(t, filepath.Join(bin, "shoal")) != "one" || read(t, m.etc("node.toml")) != "one" {
			t.Errorf("%s, undone: %v, %q", next, err, read(t, filepath.Join(bin, "shoal")))
		}
		if again := replace("one"); len(again) != 0 {
			t.Errorf("%s: another run changes %v", next, again)
		}
	}
}

// TestUndo: an earlier file comes back with its mode, owner and label, and a symbolic link
// as one.
func TestUndo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away and label them")
	}
	m := newMachine(t)
	from, bin, own := filepath.Join(t.TempDir(), "shoal"), t.TempDir(), filepath.Join(t.TempDir(), "own.toml")
	const label = "system_u:object_r:shoal_etc_t:s0"
	for _, path := range []string{m.etc("token"), own, from} {
		put(t, path, "before")
		if err := errors.Join(os.Chmod(path, 0o640), os.Chown(path, 12, 34), unix.Setxattr(path, "security.selinux", []byte(label), 0)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(own, m.etc("node.toml")); err != nil {
		t.Fatal(err)
	}
	check := func(path string) {
		t.Helper()
		var st unix.Stat_t
		has := make([]byte, 64)
		n, err := unix.Getxattr(path, "security.selinux", has)
		if err := errors.Join(err, unix.Stat(path, &st)); err != nil {
			t.Fatal(err)
		}
		if read(t, path) != "before" || st.Mode&0o777 != 0o640 || st.Uid != 12 || st.Gid != 34 || string(has[:n]) != label {
			t.Errorf("%s: %q, mode %o of %d:%d, %q", path, read(t, path), st.Mode, st.Uid, st.Gid, has[:n])
		}
	}
	p, err := stage(from, bin)
	if err != nil {
		t.Fatal(err)
	}
	changed, err := m.replace([]file{{m.etc("token"), []byte("after"), 0o600}, {m.etc("node.toml"), []byte("after"), 0o644}}, p)
	if err != nil || read(t, m.etc("token")) != "after" || read(t, m.etc("node.toml")) != "after" {
		t.Fatalf("%v; the token is %q, node.toml %q", err, read(t, m.etc("token")), read(t, m.etc("node.toml")))
	}
	if err := changed.undo(); err != nil {
		t.Fatal(err)
	}
	check(m.etc("token"))
	check(m.etc("node.toml"))
	if to, err := os.Readlink(m.etc("node.toml")); err != nil || to != own {
		t.Errorf("the link is %q, %v", to, err)
	}
	if left, err := os.ReadDir(m.Etc); err != nil || len(left) != 2 {
		t.Errorf("left: %v, %v", left, err)
	}
	if left, err := os.ReadDir(bin); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
