package integration

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/lab"
)

// fixtures are machines of distributions.
const fixtures = "../cmd/shoal/internal/install/testdata"

// fixture has the files of a distribution that install reads: path -> contents. Its markers
// are left out, since /usr and / of a box are this machine's.
func fixture(t *testing.T, name string) map[string]string {
	t.Helper()
	files, root := map[string]string{}, filepath.Join(fixtures, name)
	noError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel := must(filepath.Rel(root, path))(t)
		for _, dir := range []string{"etc/containerd/", "etc/cri/", "var/"} {
			if strings.HasPrefix(rel, dir) {
				files["/"+rel] = string(must(os.ReadFile(path))(t))
			}
		}
		return nil
	}))
	return files
}

// TestInstallDistributions: containerd itself reads the config of each distribution after
// shoal install, and CRI then uses shoal. A second time changes nothing, and --uninstall
// gives each file back.
func TestInstallDistributions(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	n := must(l.NewNet(ctx, 1))(t)
	b := must(l.NewBox(ctx, must(n.NewHost(ctx, "machine", 0, 0))(t), 256<<20))(t)
	noError(t, b.Write("/var/lib/shoal/mirror-ca.pem", "a certificate"))
	versions := l.ContainerdVersions()
	two, one := versions[:2], versions[2:]
	for _, c := range []struct {
		fixture, distribution string
		versions              []lab.ContainerdVersion
		node                  string // the node's config
	}{
		{"k3s", "k3s", two, ""},
		{"rke2", "rke2", two, ""},
		{"eks", "eks", two, ""},
		{"eks-merged", "eks", two, ""},
		{"eks-1.7", "eks", one, ""},
		{"aks", "aks", two, ""},
		{"aks-gpu", "aks", two, ""},
		{"aks-1.7", "aks", one, ""},
		{"gke", "gke", versions, "mirror_address = \"\"\n"},
		{"gke-hosts", "gke", versions, ""},
		{"kind", "kind", versions, ""},
	} {
		for _, v := range c.versions {
			t.Run(c.fixture+"/"+v.Name, func(t *testing.T) {
				files := fixture(t, c.fixture)
				must(b.Lab.Run(ctx, "rm", "-rf", "/etc/containerd", "/var/lib/rancher", "/etc/systemd/system/containerd.service.d"))(t)
				for path, text := range files {
					noError(t, b.Write(path, text))
				}
				noError(t, b.Write("/etc/shoal/node.toml", "version = 1\n"+c.node))
				shoal := func(args ...string) string {
					t.Helper()
					return must(b.Lab.Run(ctx, filepath.Join(bin(t), "shoal"), append([]string{
						"install", "containerd", "--distribution", c.distribution, "--containerd", v.Binary,
					}, args...)...))(t)
				}
				if out := shoal("--dry-run"); !strings.Contains(out, "proxy_plugins.shoal") {
					t.Errorf("the dry run says\n%s", out)
				}
				shoal() // has containerd read its config, and fails if it does not see shoal
				if out := shoal(); !strings.Contains(out, "nothing to change") {
					t.Errorf("a second time:\n%s", out)
				}
				shoal("--uninstall", "--force") // no containerd runs that has images
				left := strings.Fields(must(b.Lab.Run(ctx, "sh", "-c", "find /etc/containerd /var/lib/rancher /etc/systemd/system/containerd.service.d -type f 2>/dev/null || true"))(t))
				for _, path := range left {
					if text := string(must(os.ReadFile(b.Path(path)))(t)); text != files[path] {
						t.Errorf("%s is left as\n%s", path, text)
					}
				}
				if len(left) != len(files) {
					t.Errorf("left are %q", left)
				}
			})
		}
	}
	t.Run("talos", func(t *testing.T) { talosReads(t, b, two) })
}

// talosReads: Talos merges the document that shoal install prints with its parts, and
// containerd reads the result.
func talosReads(t *testing.T, b *lab.Box, versions []lab.ContainerdVersion) {
	ctx := t.Context()
	for path, text := range fixture(t, "talos") {
		noError(t, b.Write(path, text))
	}
	_, err := b.Lab.Run(ctx, filepath.Join(bin(t), "shoal"), "install", "containerd", "--distribution", "talos")
	if err == nil {
		t.Fatal("Talos has its config changed")
	}
	_, document, ok := strings.Cut(err.Error(), "content: |\n")
	if !ok {
		t.Fatalf("no document in %v", err)
	}
	lines := slices.DeleteFunc(strings.Split(document, "\n"), func(l string) bool { return !strings.HasPrefix(l, "  ") })
	// One file that imports both is what their merged contents are.
	noError(t, b.Write("/etc/cri/conf.d/shoal.toml", "version = 3\n"+strings.Join(lines, "\n")+"\n"))
	config := fixture(t, "talos")["/etc/cri/containerd.toml"]
	config = strings.Replace(config, `"/etc/cri/conf.d/cri.toml",`, `"/etc/cri/conf.d/cri.toml", "/etc/cri/conf.d/shoal.toml",`, 1)
	noError(t, b.Write("/etc/cri/containerd.toml", config))
	for _, v := range versions {
		dump := must(b.Lab.Run(ctx, v.Binary, "--config", "/etc/cri/containerd.toml", "config", "dump"))(t)
		for _, want := range []string{"snapshotter = 'shoal'", "disable_snapshot_annotations = false", "discard_unpacked_layers = true", "config_path = '/etc/cri/conf.d/hosts'", "[proxy_plugins.shoal]"} {
			if !strings.Contains(dump, want) {
				t.Errorf("%s does not read %s", v.Name, want)
			}
		}
	}
}

// TestInstallK3s: with k3s, which writes its config at each start, install adds what lasts:
// pods start lazily before and after such a start, and on overlayfs after --uninstall.
func TestInstallK3s(t *testing.T) {
	s := newCRISite(t, pinned(t), "", func(_ *site, o *lab.ContainerdOptions) {
		o.Shoal, o.ShoalRoot = "", ""
		o.CRI.Snapshotter, o.CRI.NoAnnotations = "overlayfs", true
	})
	ctx := t.Context()
	config, certs := s.Path("ctrd", "config.toml"), s.Path("ctrd", "certs.d")
	labs := string(must(os.ReadFile(config))(t))
	get := func(key string) string { return regexp.MustCompile(key + ` = (.*)`).FindStringSubmatch(labs)[1] }
	rendered := strings.NewReplacer(
		"/var/lib/rancher/k3s/agent/etc/containerd", s.Path("ctrd"), // the config, its drop-ins and certs.d
		`"/var/lib/rancher/k3s/agent/containerd"`, get("root"), `"/run/k3s/containerd"`, get("state"),
		`"/run/k3s/containerd/containerd.sock"`, get("address"), `"10010"`, `"0"`, `"rancher/mirrored-pause:3.6"`, get("sandbox"),
		`["/var/lib/rancher/k3s/data/cni"]`, get("bin_dirs"), `"/var/lib/rancher/k3s/agent/etc/cni/net.d"`, get("conf_dir"),
		"SystemdCgroup = true", "BinaryName = "+get("BinaryName"), "enable_selinux = false", "disable_apparmor = true\n  restrict_oom_score_adj = true\n  netns_mounts_under_state_dir = true",
		"enable_unprivileged_ports = true", "", "enable_unprivileged_icmp = true", "", // no kernel of a lab lets them
	).Replace(fixture(t, "k3s")["/var/lib/rancher/k3s/agent/etc/containerd/config.toml"])
	// k3s ends containerd, writes its files, and starts containerd again.
	start := func() {
		t.Helper()
		noError(t, s.Containerd.Stop())
		noError(t, os.WriteFile(config, []byte("disabled_plugins = ['io.containerd.nri.v1.nri']\n"+rendered), 0o600))
		noError(t, s.Containerd.Restart(ctx))
	}
	start()
	shoal := func(args ...string) error {
		_, err := s.Run(ctx, filepath.Join(bin(t), "shoal"), append([]string{
			"install", "containerd", "--distribution", "k3s", "--config", config, "--node-config", s.Path("node.toml"),
			"--containerd", pinned(t).Binary, "--address", s.Containerd.Address,
		}, args...)...)
		return err
	}
	before, first, second := s.pushApp(t, "before", "b"), s.pushApp(t, "first", "1"), s.pushApp(t, "second", "2")
	noError(t, s.CRI.Pull(ctx, before, nil))
	_, old := s.run(t, "before", before, lab.PodOptions{})

	noError(t, shoal())
	for i, ref := range []string{first, second} {
		start()
		noError(t, s.CRI.Pull(ctx, ref, nil))
		if !s.isLazy(t, ctx, ref) {
			t.Errorf("image %d is not lazy", i)
		}
		s.run(t, filepath.Base(filepath.Dir(ref))+string(rune('a'+i)), ref, lab.PodOptions{})
	}
	if got := must(old.Exec(ctx, "/guest", "cat", "/data"))(t); got != "b" {
		t.Errorf("the container from before reads %q", got)
	}
	if _, err := os.Stat(filepath.Join(certs, "_default", "hosts.toml")); err != nil {
		t.Error(err)
	}

	// Containers still use shoal, so containerd keeps it, to be able to remove them.
	if err := shoal("--uninstall"); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("uninstalling under containers: %v", err)
	}
	start()
	noError(t, s.supernode.Stop())
	noError(t, s.node.Stop())
	for name, ref := range map[string]string{"again": before, "back1": first, "back2": second} {
		s.run(t, name, ref, lab.PodOptions{})
	}
}
