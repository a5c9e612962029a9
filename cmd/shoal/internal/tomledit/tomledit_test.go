package tomledit

import (
	"errors"
	"strings"
	"testing"
)

const mark = "shoal"

func snapshotter(path ...string) Table {
	return Table{Path: path, Keys: []Key{{"snapshotter", `"shoal"`}, {"disable_snapshot_annotations", "false"}}}
}

// TestApply: the keys get there, nothing else changes, a second time changes nothing, and
// Undo gives the file back.
func TestApply(t *testing.T) {
	cri := []string{"plugins", "io.containerd.cri.v1.images"}
	for name, c := range map[string]struct {
		text   string
		tables []Table
		want   string
	}{
		"an empty file": {"", []Table{snapshotter(cri...)},
			"[plugins.'io.containerd.cri.v1.images'] # shoal\n  snapshotter = \"shoal\" # shoal\n  disable_snapshot_annotations = false # shoal\n"},
		"another value, with a comment": {
			"# mine\n[plugins.\"io.containerd.cri.v1.images\"]\n\tsnapshotter = \"overlayfs\" # the default\n[grpc]\naddress = 'x'\n", []Table{snapshotter(cri...)},
			"# mine\n[plugins.\"io.containerd.cri.v1.images\"]\n  disable_snapshot_annotations = false # shoal\n" +
				"\tsnapshotter = \"shoal\" # shoal, was: \tsnapshotter = \"overlayfs\" # the default\n[grpc]\naddress = 'x'\n"},
		"right already": {
			"[plugins]\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'shoal'\ndisable_snapshot_annotations = false\n", []Table{snapshotter(cri...)},
			"[plugins]\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'shoal'\ndisable_snapshot_annotations = false\n"},
		"an array of tables": {
			"[[a.b]]\nx = 1\n[c]\n", []Table{{Path: []string{"a", "b"}, Element: true, Keys: []Key{{"x", "1"}}}, {Path: []string{"a", "b"}, Element: true, Keys: []Key{{"x", "2"}}}},
			"[[a.b]]\nx = 1\n[c]\n[[a.b]] # shoal\n  x = 2 # shoal\n"},
		"keys before all tables": {"# mine\n[a]\n", []Table{{Keys: []Key{{"version", "3"}}}}, "version = 3 # shoal\n# mine\n[a]\n"},
		"dotted keys": {
			"[plugins]\n'io.containerd.cri.v1.images'.snapshotter = 'overlayfs'\n", []Table{{Path: cri, Keys: []Key{{"snapshotter", "'shoal'"}}}},
			"[plugins]\n'io.containerd.cri.v1.images'.snapshotter = 'shoal' # shoal, was: 'io.containerd.cri.v1.images'.snapshotter = 'overlayfs'\n"},
		"lines that end as in Windows": {"a = 1\r\n", []Table{{Keys: []Key{{"a", "2"}}}}, "a = 2 # shoal, was: a = 1\r\n"},
	} {
		got, err := Apply([]byte(c.text), mark, c.tables...)
		if err != nil || string(got) != c.want {
			t.Errorf("%s: %v\n%s\nwant\n%s", name, err, got, c.want)
			continue
		}
		if again, err := Apply(got, mark, c.tables...); err != nil || string(again) != string(got) {
			t.Errorf("%s, again: %v\n%s", name, err, again)
		}
		if back := Undo(got, mark); string(back) != c.text {
			t.Errorf("%s, undone:\n%q\nwas\n%q", name, back, c.text)
		}
	}
}

// TestByHand: what cannot be edited line by line is refused.
func TestByHand(t *testing.T) {
	cri := []string{"plugins", "io.containerd.cri.v1.images"}
	for name, text := range map[string]string{
		"an inline table":     "[plugins]\n'io.containerd.cri.v1.images' = { snapshotter = 'overlayfs' }\n",
		"one without the key": "[plugins]\n'io.containerd.cri.v1.images' = { x = 1 }\n",
		"several lines":       "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"\"\"overlay\\\n  fs\"\"\"\n",
		"not a table":         "plugins = 1\n",
		"dotted keys beside":  "[plugins]\n'io.containerd.cri.v1.images'.x = 1\n",
	} {
		if got, err := Apply([]byte(text), mark, snapshotter(cri...)); !errors.Is(err, ErrByHand) {
			t.Errorf("%s: %v\n%s", name, err, got)
		}
	}
	if _, err := Apply([]byte("a = \n"), mark); err == nil || errors.Is(err, ErrByHand) {
		t.Errorf("no TOML: %v", err)
	}
}

// TestUndoAfterEdit: what somebody has changed since stays.
func TestUndoAfterEdit(t *testing.T) {
	text := "[a]\nx = 1\n"
	got, err := Apply([]byte(text), mark, Table{Path: []string{"a"}, Keys: []Key{{"x", "2"}, {"y", "3"}}})
	if err != nil {
		t.Fatal(err)
	}
	edited := strings.Replace(string(got), "[a]\n", "[a]\nz = 9\n", 1) + "[b]\n# shoal is not a mark here\n"
	if back, want := string(Undo([]byte(edited), mark)), "[a]\nz = 9\nx = 1\n[b]\n# shoal is not a mark here\n"; back != want {
		t.Errorf("undone:\n%s\nwant\n%s", back, want)
	}
}

// FuzzApply: whatever the file, the result is refused or can be taken back.
func FuzzApply(f *testing.F) {
	f.Add("[a]\nx = 1\n")
	f.Add("a = {x = 1}\n")
	f.Add("[[a]]\nx = 1\n[a.b]\n")
	f.Add("a.b.x = 2\n[c]\n")
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, mark) || text != "" && !strings.HasSuffix(text, "\n") {
			t.Skip()
		}
		got, err := Apply([]byte(text), mark, Table{Path: []string{"a", "b"}, Keys: []Key{{"x", "1"}, {"y", "'z'"}}}, Table{Path: []string{"l"}, Element: true, Keys: []Key{{"x", "1"}}})
		if err != nil {
			return
		}
		if back := string(Undo(got, mark)); back != text {
			t.Errorf("undone: %q, was %q", back, text)
		}
	})
}
