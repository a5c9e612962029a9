package install

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/cmd/shoal/internal/tomledit"
)

// machine is a directory with containerd's files in it.
type machine struct {
	t    *testing.T
	dir  string
	node Node
}

func newMachine(t *testing.T, config string) *machine {
	m := &machine{t: t, dir: t.TempDir()}
	m.node = Node{Socket: "/run/shoal/shoal.sock", Root: "/var/lib/shoal", Mirror: "127.0.0.1:7704", MirrorCA: m.path("mirror-ca.pem")}
	m.put("mirror-ca.pem", "a certificate")
	if config != "" {
		m.put("config.toml", config)
	}
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) put(name, text string) {
	m.t.Helper()
	text = strings.ReplaceAll(text, "DIR", m.dir)
	if err := os.MkdirAll(filepath.Dir(m.path(name)), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(m.path(name), []byte(text), 0o640); err != nil {
		m.t.Fatal(err)
	}
}

// files are all that there is, but for copies.
func (m *machine) files() map[string]string {
	files := m.all()
	maps.DeleteFunc(files, func(path, _ string) bool { return strings.HasSuffix(path, copySuffix) })
	return files
}

func (m *machine) all() map[string]string {
	files := map[string]string{}
	err := filepath.WalkDir(m.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		files[path] = string(b)
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return files
}

// plain is a host of no distribution, with its config in the machine's directory.
func (m *machine) plain() Host { return Host{Config: m.path("config.toml")} }

func (m *machine) install(v Version) Plan {
	m.t.Helper()
	p, err := Containerd(m.plain(), v, m.node)
	if err != nil {
		m.t.Fatal(err)
	}
	if err := p.Apply(); err != nil {
		m.t.Fatal(err)
	}
	return p
}

func (m *machine) remove() {
	m.t.Helper()
	p, err := Remove(m.plain(), m.node, false)
	if err != nil {
		m.t.Fatal(err)
	}
	if err := p.Apply(); err != nil {
		m.t.Fatal(err)
	}
}

// configs are as distributions ship them, cut down to what shoal touches.
var configs = map[string]string{
	"1.6, Debian":               "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n      conf_dir = \"/etc/cni/net.d\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"DIR/certs.d\"\n",
	"1.7, containerd's default": "disabled_plugins = []\nimports = []\nversion = 2\n\n[plugins]\n\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    sandbox_image = \"registry.k8s.io/pause:3.8\"\n\n    [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n      default_runtime_name = \"runc\"\n      disable_snapshot_annotations = true\n      snapshotter = \"overlayfs\"\n\n    [plugins.\"io.containerd.grpc.v1.cri\".registry]\n      config_path = \"DIR/certs.d:/etc/docker/certs.d\"\n\n      [plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors]\n\n[proxy_plugins]\n",
	"2.x, containerd's default": "version = 3\nroot = '/var/lib/containerd'\nimports = ['DIR/conf.d/*.toml']\n\n[plugins]\n  [plugins.'io.containerd.cri.v1.images']\n    snapshotter = 'overlayfs'\n    disable_snapshot_annotations = true\n\n    [plugins.'io.containerd.cri.v1.images'.registry]\n      config_path = 'DIR/certs.d'\n\n[proxy_plugins]\n",
	"2.x, no drop-ins":          "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  discard_unpacked_layers = true\n  [plugins.'io.containerd.cri.v1.images'.registry]\n    config_path = 'DIR/certs.d'\n",
	"2.x, other snapshotters":   "version = 3\nimports = ['conf.d/*.toml']\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = 'DIR/certs.d'\n[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/amd64'\n  snapshotter = 'native'\n[proxy_plugins.stargz]\n  type = 'snapshot'\n  address = '/run/stargz.sock'\n",
}

// TestContainerd: what containerd reads afterwards names the node everywhere, a second time
// changes nothing, and Remove gives every file back, byte for byte.
func TestContainerd(t *testing.T) {
	for name, text := range configs {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, text)
			before := m.files()
			m.install(Version{2, 2})
			after := m.files()
			if p := m.install(Version{2, 2}); len(p.Changes) > 0 {
				t.Errorf("a second time changes %v", p.Changes)
			}
			all := ""
			for path, text := range after {
				all += text
				if err := toml.Unmarshal([]byte(text), &map[string]any{}); strings.HasSuffix(path, ".toml") && err != nil {
					t.Errorf("%s: %v", path, err)
				}
			}
			for _, want := range []string{
				"[proxy_plugins.shoal]", `snapshotter = "shoal"`, "disable_snapshot_annotations = false", `root = "/var/lib/shoal"`,
				`capabilities = ["remap-ids"]`, "[host.'https://127.0.0.1:7704']",
			} {
				if !strings.Contains(all, want) {
					t.Errorf("no %s", want)
				}
			}
			if b, err := os.ReadFile(m.path("config.toml" + copySuffix)); after[m.path("config.toml")] != before[m.path("config.toml")] && (err != nil || string(b) != before[m.path("config.toml")]) {
				t.Errorf("the copy: %v", err)
			}
			m.remove()
			for path, text := range m.files() {
				if text != before[path] {
					t.Errorf("%s is left as\n%s\nwas\n%s", path, text, before[path])
				}
			}
			if st, err := os.Stat(m.path("config.toml")); err != nil || st.Mode().Perm() != 0o640 {
				t.Errorf("mode %v, %v", st, err)
			}
		})
	}
}

// TestNoConfig: a machine without the file gets one, of containerd's version, and loses it.
func TestNoConfig(t *testing.T) {
	for version, want := range map[Version]string{{1, 7}: criPlugin, {2, 0}: imagesPlugin} {
		m := newMachine(t, "")
		p, err := Containerd(m.plain(), version, Node{Socket: "/s", Root: "/r"})
		if err != nil || len(p.Changes) != 1 || !bytes.Contains(p.Changes[0].New, []byte(want)) || len(p.Notes) != 1 {
			t.Fatalf("%v: %+v, %v", version, p, err)
		}
		if err := p.Apply(); err != nil {
			t.Fatal(err)
		}
		m.remove()
		if _, err := os.Stat(m.path("config.toml")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v: the file is left: %v", version, err)
		}
	}
}

// TestRefused: nothing is written, and the error says what to do.
func TestRefused(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"version 1":          {"[plugins.cri]\n", "config migrate"},
		"a template":         {"{{ template \"base\" . }}\n", "template"},
		"inline":             {"version = 2\n[plugins]\n\"io.containerd.grpc.v1.cri\" = { containerd = { snapshotter = \"overlayfs\" } }\n", `snapshotter = "shoal"`},
		"registries, inside": {"version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://x\"]\n", "registry.mirrors"},
		"other hosts":        {"version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"DIR/busy\"\n", "the first"},
		"no certificate yet": {"version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"DIR/certs.d\"\n", "Start the node first"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, c.text)
			m.put("busy/_default/hosts.toml", "[host.'https://mirror.example.com']\n")
			if name == "no certificate yet" {
				m.node.MirrorCA += "x"
			}
			p, err := Containerd(m.plain(), Version{1, 7}, m.node)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v does not say %q (%v)", err, c.want, p)
			}
		})
	}
	if !errors.Is(byHand("x", tomledit.ErrByHand, nil), tomledit.ErrByHand) {
		t.Error("the cause is lost")
	}
}

// TestOtherRegistries: a registry with a hosts.toml of its own is named, with the lines.
func TestOtherRegistries(t *testing.T) {
	m := newMachine(t, "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = 'DIR/certs.d'\n")
	m.put("certs.d/docker.io/hosts.toml", "[host.'https://mirror.example.com']\n")
	m.put("certs.d/quay.io/hosts.toml", "[host.'https://127.0.0.1:7704']\n")
	if p := m.install(Version{2, 2}); len(p.Notes) != 1 || !strings.Contains(p.Notes[0], "docker.io") || !strings.Contains(p.Notes[0], "mirror-ca.pem") {
		t.Errorf("notes %q", p.Notes)
	}
	p, err := Remove(m.plain(), m.node, false)
	if err != nil || len(p.Notes) != 1 || !strings.Contains(p.Notes[0], "quay.io") {
		t.Errorf("notes %q, %v", p.Notes, err)
	}
}

// TestApplyFails: what was changed before a failure is taken back.
func TestApplyFails(t *testing.T) {
	m := newMachine(t, "version = 3\n")
	m.put("goes", "old\n")
	before := m.files()
	m.put("file", "")
	p := Plan{Changes: []Change{
		{Path: m.path("goes"), Old: []byte("old\n")},
		{Path: m.path("config.toml"), Old: []byte("version = 3\n"), New: []byte("other\n")},
		{Path: m.path("new"), New: []byte("new\n")},
		{Path: m.path("file/below"), New: []byte("cannot be\n")},
	}}
	if err := p.Apply(); err == nil {
		t.Fatal("no error")
	}
	after := m.files()
	delete(after, m.path("file"))
	if !maps.Equal(after, before) {
		t.Errorf("left: %v", after)
	}
	if st, err := os.Stat(m.path("goes")); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("a file that was removed is back with another mode: %v, %v", st, err)
	}
}

// TestFilesStay: a symbolic link stays one, and so do mode, owner and label; the copy has
// them, too.
func TestFilesStay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away and label them")
	}
	m := newMachine(t, "")
	const text = "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = 'DIR/certs.d'\n"
	m.put("real/config.toml", text)
	for _, err := range []error{
		os.Symlink("real/config.toml", m.path("config.toml")),
		os.Chmod(m.path("real/config.toml"), 0o600),
		os.Chown(m.path("real/config.toml"), 12, 34),
		unix.Setxattr(m.path("real/config.toml"), selinux, []byte("system_u:object_r:container_config_t:s0\x00"), 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	check := func(path string) {
		t.Helper()
		var st unix.Stat_t
		label := make([]byte, 64)
		size, err := unix.Getxattr(path, selinux, label)
		if err := errors.Join(err, unix.Stat(path, &st)); err != nil {
			t.Fatal(err)
		}
		if st.Mode&0o777 != 0o600 || st.Uid != 12 || st.Gid != 34 || string(label[:size]) != "system_u:object_r:container_config_t:s0\x00" {
			t.Errorf("%s: mode %o of %d:%d, %q", path, st.Mode, st.Uid, st.Gid, label[:size])
		}
	}
	m.install(Version{2, 2})
	check(m.path("real/config.toml"))
	check(m.path("real/config.toml" + copySuffix))
	if to, err := os.Readlink(m.path("config.toml")); err != nil || to != "real/config.toml" {
		t.Errorf("the link is %q, %v", to, err)
	}
	m.remove()
	check(m.path("real/config.toml"))
	if _, err := os.Stat(m.path("real/config.toml" + copySuffix)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the copy is left: %v", err)
	}

	if err := errors.Join(os.Remove(m.path("real/config.toml")), (Change{Path: m.path("config.toml"), New: []byte("x")}).write()); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("error %v", err)
	}
	if err := readOnly("/etc/x", &fs.PathError{Op: "open", Path: "/etc/x", Err: unix.EROFS}); !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), "is made from") {
		t.Errorf("error %v", err)
	}
}

// TestCopy: the copy is the file as it was before the last installation.
func TestCopy(t *testing.T) {
	m := newMachine(t, "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = 'DIR/certs.d'\n")
	m.install(Version{2, 2})
	text := m.files()[m.path("config.toml")]
	m.put("config.toml", "# mine\n"+text)
	m.remove()
	m.install(Version{2, 2})
	m.install(Version{2, 2})
	if b, err := os.ReadFile(m.path("config.toml" + copySuffix)); err != nil || !strings.HasPrefix(string(b), "# mine\nversion") || strings.Contains(string(b), mark) {
		t.Errorf("%s, %v", b, err)
	}
}

// TestRecord: the list has the files of all installations that were not taken back, also of
// those with another config, and goes with the last one.
func TestRecord(t *testing.T) {
	m := newMachine(t, "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = 'DIR/certs.d'\n")
	m.put("other.toml", "version = 3\n")
	record := m.path("etc/containerd-files")
	one, two := m.plain(), Host{Config: m.path("other.toml"), Certs: m.path("certs.d")}
	one.Record, two.Record = record, record
	check := func(what string, p Plan, err error, notes int, want ...string) {
		t.Helper()
		if err := errors.Join(err, p.Apply()); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if len(p.Notes) != notes {
			t.Errorf("%s: notes %q", what, p.Notes)
		}
		b, err := os.ReadFile(record)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		got := slices.DeleteFunc(strings.Fields(string(b)), func(s string) bool { return !filepath.IsAbs(s) })
		for i := range want {
			want[i] = m.path(want[i])
		}
		if !slices.Equal(got, want) || (len(want) == 0) != (b == nil) {
			t.Errorf("%s: the list is %q, not %q", what, b, want)
		}
	}
	install := func(h Host) (Plan, error) { return Containerd(h, Version{2, 2}, m.node) }
	const hosts = "certs.d/_default/hosts.toml"
	p, err := install(one)
	check("one", p, err, 0, hosts, "config.toml")
	p, err = install(two)
	check("two", p, err, 0, hosts, "config.toml", "other.toml")
	if p, err = install(one); err != nil || len(p.Changes) > 0 {
		t.Errorf("another time changes %v, %v", p.Changes, err)
	}
	if err := os.Remove(record); err != nil {
		t.Fatal(err)
	}
	p, err = install(one)
	check("one, after the list was lost", p, err, 0, hosts, "config.toml")
	p, err = install(two)
	check("two, after the list was lost", p, err, 0, hosts, "config.toml", "other.toml")
	p, err = Remove(one, m.node, true)
	check("one, while it is in use", p, err, 0, "config.toml", "other.toml")
	p, err = Remove(one, m.node, false)
	check("one is taken back", p, err, 1, "other.toml")
	if len(p.Notes) == 1 && !strings.Contains(p.Notes[0], m.path("other.toml")+" still has lines") {
		t.Errorf("notes %q", p.Notes)
	}
	if err := os.Remove(m.path("other.toml")); err != nil { // by the operator
		t.Fatal(err)
	}
	p, err = Remove(one, m.node, false)
	check("nothing is left", p, err, 0)
}

// TestRemoveUsed: as long as containers use the node, containerd goes on knowing it, and
// uses it for nothing new. After that, all is as it was before.
func TestRemoveUsed(t *testing.T) {
	for name, text := range configs {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, text)
			before := m.files()
			m.install(Version{2, 2})
			for range 2 {
				p, err := Remove(m.plain(), m.node, true)
				if err != nil {
					t.Fatal(err)
				}
				if err := p.Apply(); err != nil {
					t.Fatal(err)
				}
				all := ""
				for path, text := range m.files() {
					all += text
					if err := toml.Unmarshal([]byte(text), &map[string]any{}); strings.HasSuffix(path, ".toml") && err != nil {
						t.Errorf("%s: %v", path, err)
					}
				}
				if !strings.Contains(all, "[proxy_plugins.shoal]") || !strings.Contains(all, `address = "/run/shoal/shoal.sock"`) || !strings.Contains(all, `root = "/var/lib/shoal"`) {
					t.Errorf("containerd does not know the node any more:\n%s", all)
				}
				if strings.Contains(all, `snapshotter = "shoal"`) || strings.Contains(all, "127.0.0.1:7704") {
					t.Errorf("containerd still uses the node:\n%s", all)
				}
			}
			m.remove()
			for path, text := range m.files() {
				if text != before[path] {
					t.Errorf("%s is left as\n%s\nwas\n%s", path, text, before[path])
				}
			}
		})
	}
}
