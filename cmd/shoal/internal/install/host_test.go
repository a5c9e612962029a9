package install

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/shoalfs/shoal/cmd/shoal/internal/tomledit"
	"github.com/shoalfs/shoal/deploy"
)

// absolute is a path in a fixture that becomes one below the test's directory.
var absolute = regexp.MustCompile(`(["':])/(etc|home|opt|run|usr|var)/`)

// newFixture copies the machine of a distribution.
func newFixture(t *testing.T, name string) *machine {
	m := newMachine(t, "")
	m.node.MirrorCA = m.path("var/lib/shoal/mirror-ca.pem")
	m.put("var/lib/shoal/mirror-ca.pem", "a certificate")
	if err := os.Remove(m.path("mirror-ca.pem")); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join("testdata", name)
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		m.put(rel, absolute.ReplaceAllString(string(b), "${1}"+m.dir+"/${2}/"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *machine) host(name string) Host {
	m.t.Helper()
	h, err := Detect(m.dir, name)
	if err != nil {
		m.t.Fatal(err)
	}
	return h
}

// installed are the machines on which install changes files.
var installed = map[string]struct {
	name    string
	version Version
	// changes are the files that are changed or made, below the machine's root.
	changes []string
	// notes has a part of each note.
	notes []string
}{
	"k3s": {"k3s", Version{2, 2}, []string{
		"var/lib/rancher/k3s/agent/etc/containerd/certs.d/_default/hosts.toml",
		"var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/99-shoal.toml",
	}, []string{"/etc/rancher/k3s/registries.yaml"}},
	"rke2": {"rke2", Version{2, 1}, []string{
		"var/lib/rancher/rke2/agent/etc/containerd/certs.d/_default/hosts.toml",
		"var/lib/rancher/rke2/agent/etc/containerd/config-v3.toml.d/99-shoal.toml",
	}, nil},
	"eks":        {"eks", Version{2, 1}, atBoot, []string{"each start of containerd makes the changes again"}},
	"eks-merged": {"eks", Version{2, 2}, atBoot, []string{"each start of containerd makes the changes again"}},
	"eks-1.7":    {"eks", Version{1, 7}, atBoot, []string{"each start of containerd makes the changes again"}},
	"aks":        {"aks", Version{2, 0}, standard, nil},
	"aks-gpu":    {"aks", Version{2, 0}, standard, nil},
	"aks-1.7":    {"aks", Version{1, 7}, standard, nil},
	"kind":       {"kind", Version{2, 2}, standard, nil},
	"gke-hosts": {"gke", Version{2, 0}, []string{
		"etc/containerd/config.toml", "etc/containerd/hosts.d/_default/hosts.toml",
		"etc/systemd/system/containerd.service.d/shoal.conf",
	}, []string{"each start of containerd makes the changes again", "hosts.d/docker.io/hosts.toml"}},
}

var (
	standard = []string{"etc/containerd/certs.d/_default/hosts.toml", "etc/containerd/config.toml"}
	atBoot   = append(slices.Clone(standard), "etc/systemd/system/containerd.service.d/shoal.conf")
)

// TestDistributions: install changes the files that last and no others, what containerd
// reads then names shoal and all that was there, a second time changes nothing, and Remove
// gives every file back.
func TestDistributions(t *testing.T) {
	for name, want := range installed {
		t.Run(name, func(t *testing.T) {
			m := newFixture(t, name)
			before := m.files()
			h := m.host("")
			if h.Name != want.name {
				t.Fatalf("it counts as %q", h.Name)
			}
			was := merged(t, h)
			install := func() Plan {
				p, err := Containerd(h, want.version, m.node, "/opt/shoal/bin/shoal", "install", "containerd")
				if err != nil {
					t.Fatal(err)
				}
				if err := p.Apply(); err != nil {
					t.Fatal(err)
				}
				return p
			}
			p := install()
			after := m.files()
			changed := []string{}
			for path, text := range after {
				if before[path] != text {
					rel, err := filepath.Rel(m.dir, path)
					if err != nil {
						t.Fatal(err)
					}
					changed = append(changed, rel)
				}
			}
			slices.Sort(changed)
			if !slices.Equal(changed, want.changes) {
				t.Errorf("changed are %q, not %q", changed, want.changes)
			}
			if len(p.Notes) != len(want.notes) {
				t.Errorf("notes: %q", p.Notes)
			}
			for _, part := range want.notes {
				if !strings.Contains(strings.Join(p.Notes, "\n"), part) {
					t.Errorf("no note says %q: %q", part, p.Notes)
				}
			}
			now := merged(t, h)
			if !usesShoal(now) {
				t.Errorf("no shoal in %v", now)
			}
			kept(t, "", was, now)
			if p := install(); len(p.Changes) > 0 {
				t.Errorf("a second time changes %v", p.Changes)
			}
			if p, err := Remove(h, m.node, false); err != nil {
				t.Error(err)
			} else if err := p.Apply(); err != nil {
				t.Error(err)
			}
			if left := m.all(); !maps.Equal(left, before) {
				t.Errorf("left are %q", slices.Sorted(maps.Keys(left)))
			}
		})
	}
}

// merged is what containerd 2.x makes of a config and its imports.
func merged(t *testing.T, h Host) map[string]any {
	t.Helper()
	var out map[string]any
	for _, path := range []string{h.Config, filepath.Join(h.dropIns(), dropIn)} {
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		// Decoding into a map that has a table adds to the table.
		if err := toml.Unmarshal(b, &out); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// usesShoal says whether one of CRI's plugins has shoal and annotations, and shoal is known.
func usesShoal(config map[string]any) bool {
	plugins := table(config, "plugins")
	for _, cri := range []map[string]any{table(plugins, imagesPlugin), table(plugins, criPlugin, "containerd")} {
		if cri["snapshotter"] == "shoal" && cri["disable_snapshot_annotations"] == false {
			return table(config, "proxy_plugins", "shoal") != nil
		}
	}
	return false
}

// kept reports what install changed beside the two keys of CRI.
func kept(t *testing.T, at string, was, now map[string]any) {
	t.Helper()
	for k, v := range was {
		table, ok := v.(map[string]any)
		other, _ := now[k].(map[string]any)
		switch {
		case ok:
			kept(t, at+"."+k, table, other)
		case k == "snapshotter" || k == "disable_snapshot_annotations":
		case !equal(v, now[k]):
			t.Errorf("%s.%s was %v and is %v", at, k, v, now[k])
		}
	}
}

func equal(a, b any) bool {
	x, errX := toml.Marshal(map[string]any{"x": a})
	y, errY := toml.Marshal(map[string]any{"x": b})
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// TestDistributionsByHand: where files do not last or cannot be edited, nothing is planned,
// and the error says what to do.
func TestDistributionsByHand(t *testing.T) {
	for name, c := range map[string]struct {
		distribution string
		cause        error
		want         []string
	}{
		"k3s-2025":     {"k3s", tomledit.ErrByHand, []string{"config-v3.toml.d/*.toml", "Upgrade k3s", "[proxy_plugins.shoal]", `snapshotter = "shoal"`}},
		"gke":          {"gke", tomledit.ErrByHand, []string{"registry.mirrors", "mirror_address"}},
		"talos":        {"talos", ErrUnsupported, []string{"kind: CRICustomizationConfig", "  [proxy_plugins.shoal]\n"}},
		"bottlerocket": {"bottlerocket", ErrUnsupported, []string{"settings"}},
		"crio":         {"crio", ErrUnsupported, []string{"CRI-O"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newFixture(t, name)
			h := m.host("")
			if h.Name != c.distribution {
				t.Fatalf("it counts as %q", h.Name)
			}
			err := h.Refused(m.node)
			if err == nil {
				_, err = Containerd(h, Version{2, 0}, m.node)
			}
			if !errors.Is(err, c.cause) {
				t.Fatalf("error %v", err)
			}
			for _, part := range c.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("the error does not say %q:\n%v", part, err)
				}
			}
		})
	}
}

// TestGKEWithoutMirror: with the mirror off, mirrors in config.toml are no obstacle, and
// on Container-Optimized OS the operator reads that nothing of it lasts.
func TestGKEWithoutMirror(t *testing.T) {
	m := newFixture(t, "gke")
	m.node.Mirror = ""
	h := m.host("")
	p, err := Containerd(h, Version{1, 7}, m.node)
	if err != nil || len(p.Changes) != 1 || p.Changes[0].Path != h.Config || len(p.Notes) != 2 || !strings.Contains(p.Notes[0], "after each boot") {
		t.Errorf("%+v, %v", p, err)
	}
}

// TestDetect: a machine of no distribution has containerd's own paths, a name that is given
// counts, and CRI-O beside containerd does not.
func TestDetect(t *testing.T) {
	m := newMachine(t, "")
	h := m.host("")
	if h.Name != "" || h.Config != m.path(standardConfig) || h.Socket != standardSocket || h.Program != "containerd" || h.Unit != "" {
		t.Errorf("%+v", h)
	}
	if h := m.host("rke2"); h.Program != m.path("/var/lib/rancher/rke2/bin/containerd") || len(h.Services) != 2 {
		t.Errorf("%+v", h)
	}
	if _, err := Detect(m.dir, "gardener"); err == nil || !strings.Contains(err.Error(), "k3s, rke2") {
		t.Errorf("error %v", err)
	}
	m.put("run/crio/crio.sock", "")
	if h := m.host(""); h.Name != "crio" {
		t.Errorf("%+v", h)
	}
	m.put("run/containerd/containerd.sock", "")
	if h := m.host(""); h.Name != "" {
		t.Errorf("%+v", h)
	}
	if h := m.host("containerd"); h.Name != "" {
		t.Errorf("%+v", h)
	}
}

// TestVersions: containerd 2.0 and 2.1 get the directory of hosts.toml files, which 2.2 has
// by itself, and a file of version 2 gets the plugin that containerd 2.x reads.
func TestVersions(t *testing.T) {
	const (
		two     = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = 'x'\n"
		runtime = two + "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\nsnapshotter = 'other'\n"
		three   = "version = 3\n"
	)
	for _, c := range []struct {
		text     string
		v        Version
		want     string
		path     bool // config_path is set
		handlers int
	}{
		{two, Version{1, 7}, "[plugins.'io.containerd.grpc.v1.cri'.containerd]", true, 0},
		{two, Version{2, 1}, "[plugins.'io.containerd.cri.v1.images']", true, 0},
		{two, Version{2, 2}, "[plugins.'io.containerd.cri.v1.images']", false, 0},
		{runtime, Version{2, 2}, "[plugins.'io.containerd.grpc.v1.cri'.containerd]", false, 1},
		{three, Version{2, 0}, "[plugins.'io.containerd.cri.v1.images']", true, 0},
		{three, Version{2, 4}, "[plugins.'io.containerd.cri.v1.images']", false, 0},
		{"version = 4\n", Version{2, 4}, "[plugins.'io.containerd.cri.v1.images']", false, 0},
	} {
		m := newMachine(t, c.text)
		h := m.plain()
		h.Certs = m.path("certs.d")
		p, err := Containerd(h, c.v, m.node)
		if err != nil || len(p.Changes) != 2 {
			t.Fatalf("%v: %v, %v", c.v, p, err)
		}
		text := string(p.Changes[0].New)
		if !strings.Contains(text, c.want+" # "+mark+"\n  snapshotter") || strings.Contains(text, "config_path") != c.path || len(p.Notes) != c.handlers {
			t.Errorf("%v with\n%s\ngets\n%s%q", c.v, c.text, text, p.Notes)
		}
	}
}

// TestOrder: the node's unit starts before each unit that runs containerd.
func TestOrder(t *testing.T) {
	before := map[string]bool{}
	for line := range strings.Lines(deploy.NodeUnit) {
		if units, ok := strings.CutPrefix(line, "Before="); ok {
			for _, unit := range strings.Fields(units) {
				before[unit] = true
			}
		}
	}
	m := newMachine(t, "")
	for _, name := range Names() {
		for _, service := range m.host(name).Services {
			if !before[service+".service"] {
				t.Errorf("on %s, %s may start before the node", name, service)
			}
		}
	}
}

// TestRemovalOfPackages: the script that refuses to remove a package finds every file with
// lines of install on every distribution, and none afterwards.
func TestRemovalOfPackages(t *testing.T) {
	b, err := os.ReadFile("../../../../deploy/release/scripts/preremove.sh")
	if err != nil {
		t.Fatal(err)
	}
	// The rest of the script stops the node.
	_, text, _ := strings.Cut(string(b), "\n\n")
	text, _, ok := strings.Cut(text, "# replaced says")
	if !ok || !strings.Contains(text, "configured()") {
		t.Fatalf("the script does not begin as it did: %s", b)
	}
	for name, want := range installed {
		t.Run(name, func(t *testing.T) {
			m := newFixture(t, name)
			h := m.host("")
			h.Record = m.path("etc/shoal/" + RecordName)
			found := func() string {
				t.Helper()
				here := strings.NewReplacer(" /etc/", " "+m.path("etc")+"/", " /var/", " "+m.path("var")+"/").Replace(text)
				out, err := exec.CommandContext(t.Context(), "sh", "-c", here+"\nconfigured | LC_ALL=C sort -u").CombinedOutput()
				if err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				return string(out)
			}
			p, err := Containerd(h, want.version, m.node, "/opt/shoal/bin/shoal")
			if err := errors.Join(err, p.Apply()); err != nil {
				t.Fatal(err)
			}
			all := ""
			for _, path := range want.changes {
				all += m.path(path) + "\n"
			}
			if got := found(); got != all {
				t.Errorf("it finds\n%s, not\n%s", got, all)
			}
			p, err = Remove(h, m.node, false)
			if err := errors.Join(err, p.Apply()); err != nil {
				t.Fatal(err)
			}
			if got := found(); got != "" {
				t.Errorf("it still finds %s", got)
			}
		})
	}
}

// TestUnit: words that systemd would take apart or replace are quoted.
func TestUnit(t *testing.T) {
	got := string(Host{Name: "eks"}.unit([]string{"/opt/a b/shoal", "--config=/etc/100%.toml", "-x"}))
	if want := "ExecStartPre=-\"/opt/a b/shoal\" \"--config=/etc/100%%.toml\" -x\n"; !strings.HasSuffix(got, want) {
		t.Errorf("%s", got)
	}
}
