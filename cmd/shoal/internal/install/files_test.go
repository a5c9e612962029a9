package install

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/cmd/shoal/internal/tomledit"
)

const (
	criTable    = `plugins."io.containerd.grpc.v1.cri"`
	imagesTable = `plugins.'io.containerd.cri.v1.images'`
)

// TestOddConfigs: a legal file is edited however it is written, and comes back byte for byte.
func TestOddConfigs(t *testing.T) {
	for name, text := range map[string]string{
		"an empty file":          "",
		"comments alone":         "# mine\n\n#[plugins]\n",
		"no end of line":         "version = 3",
		"none after a value":     "version = 2\n[" + criTable + ".containerd]\nsnapshotter = 'overlayfs'",
		"lines as in Windows":    "version = 3\r\n[" + imagesTable + "]\r\nsnapshotter = 'overlayfs' # c\r\ndiscard_unpacked_layers = true\r\n",
		"dotted keys":            criTable + ".containerd.snapshotter = 'overlayfs'\nversion = 2\n",
		"dotted keys in a table": "version = 2\n[" + criTable + "]\ncontainerd.snapshotter = 'overlayfs'\n",
		"an inline table inside": "version = 3\n[plugins]\n'io.containerd.cri.v1.runtime' = { cni = { bin_dir = '/x' } }\n",
		"odd headers":            "version = 2\n [ plugins . 'io.containerd.grpc.v1.cri' . \"containerd\" ] # [x]\n \"snap\\u0073hotter\"=\"overlayfs\"#c\n",
		"comments":               "# version = 1\nversion = 3 # 2\n#[" + imagesTable + "]\n[" + imagesTable + "] #x\n# snapshotter = 'a'\nsnapshotter = 'overlayfs' # snapshotter = 'b'\n",
		"a string of lines":      "version = 3\nroot = '''\n[" + imagesTable + "]\nsnapshotter = 'x'\n'''\n",
		"tables below first":     "version = 2\n[" + criTable + ".containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n[plugins]\n[" + criTable + "]\nsandbox_image = 'x'\n",
		"imports twice":          "version = 3\nimports = [\n  'conf.d/*.toml', # x\n  \"DIR/conf.d/*.toml\",\n]\n",
		"imports of one file":    "version = 3\nimports = ['DIR/other.toml']\n",
		"variables, as MicroK8s": "version = 2\n[" + criTable + ".containerd]\nsnapshotter = \"${SNAPSHOTTER}\"\n[" + criTable + ".registry]\nconfig_path = 'DIR/certs.d'\n",
		"version 4":              "version = 4\n",
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, "version = 3")
			m.put("config.toml", text)
			h := m.plain()
			h.Certs = m.path("certs.d")
			before := m.all()
			for range 2 {
				p, err := Containerd(h, Version{2, 2}, m.node)
				if err := errors.Join(err, p.Apply()); err != nil {
					t.Fatal(err)
				}
			}
			if !usesShoal(merged(t, h)) && !usesShoal(merged(t, Host{Config: m.path("conf.d/" + dropIn)})) {
				t.Errorf("no shoal in %q", m.files())
			}
			p, err := Remove(h, m.node, false)
			if err := errors.Join(err, p.Apply()); err != nil {
				t.Fatal(err)
			}
			if after := m.all(); !maps.Equal(after, before) {
				t.Errorf("left are %q, and were %q", after, before)
			}
		})
	}
}

// TestLinks: the file that a link leads to is edited, and the link stays, also where nothing
// but shoal's lines was in the file.
func TestLinks(t *testing.T) {
	for _, text := range []string{"", "version = 3", "version = 3\n"} {
		m := newMachine(t, "")
		m.put("store/config.toml", text)
		if err := os.Symlink("store/config.toml", m.path("config.toml")); err != nil {
			t.Fatal(err)
		}
		h := m.plain()
		h.Certs = m.path("certs.d")
		before := m.all()
		check := func(when string) {
			t.Helper()
			if to, err := os.Readlink(m.path("config.toml")); err != nil || to != "store/config.toml" {
				t.Errorf("%q, %s: the link is %q, %v", text, when, to, err)
			}
			if after := m.all(); !maps.Equal(after, before) {
				t.Errorf("%q, %s: left are %q, and were %q", text, when, after, before)
			}
		}
		p, err := Containerd(h, Version{2, 2}, m.node)
		if err := errors.Join(err, p.Apply(), p.Undo()); err != nil {
			t.Fatal(err)
		}
		check("undone")
		if err := p.Apply(); err != nil {
			t.Fatal(err)
		}
		installed := m.all()
		p, err = Remove(h, m.node, false)
		if err := errors.Join(err, p.Apply()); err != nil {
			t.Fatal(err)
		}
		check("removed")
		if err := p.Undo(); err != nil {
			t.Fatal(err)
		}
		if to, err := os.Readlink(m.path("config.toml")); err != nil || to != "store/config.toml" {
			t.Errorf("%q: the link is %q, %v", text, to, err)
		}
		if now := m.files(); now[m.path("store/config.toml")] != installed[m.path("store/config.toml")] {
			t.Errorf("%q: the removal, undone, has left %q", text, now)
		}
	}
}

// readOnlyMount has this test see a directory that cannot be written to.
func readOnlyMount(t *testing.T, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts in a mount namespace of its own: run as root")
	}
	runtime.LockOSThread() // the thread ends with the test
	for _, err := range []error{
		unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount(dir, dir, "", unix.MS_BIND, ""),
		unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// TestReadOnly: what cannot be written is said, with what to do, and nothing is left; but for
// the list of files, which containerd can do without.
func TestReadOnly(t *testing.T) {
	m := newMachine(t, "")
	m.put("store/config.toml", "version = 3\n")
	m.put("config.toml", "version = 3\n")
	if err := os.Symlink("store/config.toml", m.path("linked.toml")); err != nil {
		t.Fatal(err)
	}
	readOnlyMount(t, m.path("store"))
	before := m.all()
	h := Host{Config: m.path("linked.toml"), Certs: m.path("certs.d")}
	p, err := Containerd(h, Version{2, 2}, m.node)
	if err := errors.Join(err, p.Apply()); !errors.Is(err, unix.EROFS) || !strings.HasSuffix(err.Error(), "to what "+m.path("store/config.toml")+" is made from") {
		t.Errorf("error %v", err)
	}
	if after := m.all(); !maps.Equal(after, before) {
		t.Errorf("left are %q, and were %q", after, before)
	}

	h.Config, h.Record = m.path("config.toml"), m.path("store/shoal/"+RecordName)
	p, err = Containerd(h, Version{2, 2}, m.node)
	if err := errors.Join(err, p.Apply()); err != nil || len(p.Notes) != 1 || !strings.Contains(p.Notes[0], RecordName) || !strings.Contains(p.Notes[0], "--uninstall") {
		t.Errorf("%q, %v", p.Notes, err)
	}
	p, err = Remove(h, m.node, false)
	if err := errors.Join(err, p.Apply()); err != nil || len(p.Notes) != 0 {
		t.Errorf("%q, %v", p.Notes, err)
	}
	if after := m.all(); !maps.Equal(after, before) {
		t.Errorf("left are %q, and were %q", after, before)
	}
}

// TestHostsDirectories: containerd takes the first directory that has something for a registry
// or for all, so the mirror's file hides no other.
func TestHostsDirectories(t *testing.T) {
	const (
		one, two = "certs.d/_default/hosts.toml", "docker/_default/hosts.toml"
		ca       = "docker/registry.example.com/ca.crt"
	)
	m := newMachine(t, "version = 3\n["+imagesTable+".registry]\nconfig_path = ':DIR/certs.d:DIR/docker'\n")
	check := func(what string, files ...string) {
		t.Helper()
		for _, name := range []string{one, two} {
			_, err := os.Stat(m.path(name))
			if want := len(files) > 0 && files[0] == name; (err == nil) != want {
				t.Errorf("%s: %s: %v", what, name, err)
			}
			if _, dir := os.Stat(filepath.Dir(m.path(name))); err != nil && dir == nil {
				t.Errorf("%s: the directory of %s is left, and hides others", what, name)
			}
		}
	}
	m.install(Version{2, 2})
	check("nothing else", one)
	m.put(ca, "a certificate")
	m.install(Version{2, 2})
	check("a registry in the second", two)
	m.put("certs.d/docker.io/hosts.toml", "")
	if p := m.install(Version{2, 2}); len(p.Changes) > 0 || len(p.Notes) != 1 {
		t.Errorf("%v, %q", p.Changes, p.Notes)
	}
	m.remove()
	check("removed")
	m.put("docker/_default/hosts.toml", "")
	m.install(Version{2, 2})
	m.remove()
	if _, err := os.Stat(m.path(two)); err != nil {
		t.Errorf("an empty file of others is gone: %v", err)
	}
	m.put("certs.d/_default/ca.crt", "a certificate")
	m.install(Version{2, 2})
	if _, err := os.Stat(m.path(one)); err != nil {
		t.Errorf("the second is hidden already: %v", err)
	}
}

// TestImports: what containerd imports counts, too.
func TestImports(t *testing.T) {
	m := newMachine(t, "version = 3\nimports = ['conf.d/*.toml']\n")
	m.put("conf.d/10-hosts.toml", "version = 3\n["+imagesTable+".registry]\nconfig_path = 'DIR/elsewhere'\n")
	m.put("conf.d/20-kata.toml", "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\nsnapshotter = 'nydus'\n"+
		"[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = 'nydus'\n")
	m.put("conf.d/30-wrong.toml", "version = \n")
	before := m.all()
	p := m.install(Version{2, 2})
	if _, err := os.Stat(m.path("elsewhere/_default/hosts.toml")); err != nil {
		t.Error(err)
	}
	notes := strings.Join(p.Notes, "\n")
	if len(p.Notes) != 2 || !strings.Contains(notes, "handler kata") || !strings.Contains(notes, "unpack_config") {
		t.Errorf("notes %q", p.Notes)
	}
	if text := m.files()[m.path("conf.d/"+dropIn)]; strings.Contains(text, "unpack_config") {
		t.Errorf("it replaces the snapshotters of another file:\n%s", text)
	}
	m.remove()
	if after := m.all(); !maps.Equal(after, before) {
		t.Errorf("left are %q, and were %q", after, before)
	}

	m = newMachine(t, "version = 2\n["+criTable+".registry]\nconfig_path = \"${DATA}/certs.d\"\n")
	if _, err := Containerd(m.plain(), Version{1, 7}, m.node); !errors.Is(err, tomledit.ErrByHand) || !strings.Contains(err.Error(), "${DATA}/certs.d") {
		t.Errorf("error %v", err)
	}
}
