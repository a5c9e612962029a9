package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestInstallContainerd: one command lets a containerd that runs pods on overlayfs start
// them lazily, and one takes it back: the config is what it was, byte for byte, and pods of
// the images that were pulled lazily start, with node and supernode gone.
func TestInstallContainerd(t *testing.T) {
	eachContainerd(t, func(t *testing.T, v lab.ContainerdVersion) {
		s := newCRISite(t, v, "", func(_ *site, o *lab.ContainerdOptions) {
			o.Shoal, o.ShoalRoot = "", ""
			o.CRI.Snapshotter, o.CRI.NoAnnotations = "overlayfs", true
		})
		ctx := t.Context()
		before, lazy := s.pushApp(t, "before", "b"), s.pushApp(t, "lazy", "l")
		noError(t, s.CRI.Pull(ctx, before, nil))
		oldPod, old := s.run(t, "before", before, lab.PodOptions{})

		config := s.Path("ctrd", "config.toml")
		files := map[string]string{config: string(must(os.ReadFile(config))(t))}
		shoal := func(args ...string) {
			t.Helper()
			args = append([]string{
				"install", "containerd", "--config", config, "--node-config", s.Path("node.toml"),
				"--containerd", v.Binary, "--address", s.Containerd.Address,
			}, args...)
			must(s.Run(ctx, filepath.Join(bin(t), "shoal"), args...))(t)
		}
		shoal("--dry-run")
		if now := string(must(os.ReadFile(config))(t)); now != files[config] {
			t.Error("a dry run has changed the config")
		}
		shoal()
		shoal()
		noError(t, s.Containerd.Stop())
		noError(t, s.Containerd.Restart(ctx))
		noError(t, s.CRI.Pull(ctx, lazy, nil))
		if !s.isLazy(t, ctx, lazy) {
			t.Error("the image is not lazy after the installation")
		}
		lazyPod, c := s.run(t, "lazy", lazy, lab.PodOptions{})
		if got := must(c.Exec(ctx, "/guest", "cat", "/data"))(t); got != "l" {
			t.Errorf("the container reads %q", got)
		}
		if got := must(old.Exec(ctx, "/guest", "cat", "/data"))(t); got != "b" {
			t.Errorf("the container from before reads %q", got)
		}

		// As long as a container needs shoal, containerd has to know it, or the container could
		// not be removed.
		args := []string{"install", "containerd", "--uninstall", "--config", config, "--node-config", s.Path("node.toml"), "--address", s.Containerd.Address}
		if out, err := s.Run(ctx, filepath.Join(bin(t), "shoal"), args...); err == nil || !strings.Contains(err.Error(), "exit status 3") {
			t.Errorf("uninstalled under a container: %v\n%s", err, out)
		}
		noError(t, s.Containerd.Stop())
		noError(t, s.Containerd.Restart(ctx))
		if got := must(c.Exec(ctx, "/guest", "cat", "/data"))(t); got != "l" {
			t.Errorf("the container reads %q after the first step", got)
		}
		during, _ := s.run(t, "during", before, lab.PodOptions{})
		for _, p := range []*lab.Pod{during, lazyPod, oldPod} {
			noError(t, p.Stop(ctx))
			noError(t, p.Remove(ctx))
		}

		shoal("--uninstall")
		for path, text := range files {
			if now := string(must(os.ReadFile(path))(t)); now != text {
				t.Errorf("%s is left as\n%s", path, now)
			}
		}
		if _, err := os.Stat(s.Path("ctrd", "certs.d", "_default", "hosts.toml")); !os.IsNotExist(err) {
			t.Errorf("hosts.toml is left: %v", err)
		}
		noError(t, s.Containerd.Stop())
		noError(t, s.Containerd.Restart(ctx))
		noError(t, s.supernode.Stop())
		noError(t, s.node.Stop())
		noError(t, s.registry.Stop())
		for name, ref := range map[string]string{"again": before, "back": lazy} {
			s.run(t, name, ref, lab.PodOptions{})
		}
	})
}
