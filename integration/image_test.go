package integration

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestContainerImage: containerd imports what `make image` writes, a registry takes
// it, and it runs, unpacked and lazily. With nothing in it but the program, the
// certificates, and the places where a cluster mounts what is the operator's.
func TestContainerImage(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	file := s.Path("shoal-image.tar")
	build := exec.CommandContext(ctx, "go", "run", ".", "image", "--version", "v1.2.3", "--dist", s.Dir, "--platforms", "linux/"+runtime.GOARCH)
	build.Dir = "../deploy/release"
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("make the image: %v\n%s", err, out)
	}
	imported := "ghcr.io/shoalfs/shoal:v1.2.3"
	must(s.Ctr(ctx, "images", "import", "--snapshotter", "overlayfs", file))(t)
	must(s.Run(ctx, "skopeo", "copy", "--all", "--dest-tls-verify=false", "oci-archive:"+file, "docker://"+s.registry.Addr+"/shoal:v1.2.3"))(t)
	pushed := s.registry.Addr + "/shoal:v1.2.3"
	noError(t, s.Pull(ctx, "shoal", pushed))
	if !s.isLazy(t, ctx, pushed) {
		t.Error("the pushed image is not lazy")
	}
	for snapshotter, ref := range map[string]string{"overlayfs": imported, "shoal": pushed} {
		run := func(args ...string) string {
			id := filepath.Base(s.Dir) + "-" + snapshotter
			return must(s.Ctr(ctx, append([]string{"run", "--rm", "--snapshotter", snapshotter, ref, id}, args...)...))(t)
		}
		// Without arguments, the entry point shows its help.
		if out := run(); !strings.Contains(out, "Usage:\n  shoal") {
			t.Errorf("%s: the container prints %q", snapshotter, out)
		}
		if out := run("/usr/local/bin/shoal", "version"); !strings.HasPrefix(out, "shoal v1.2.3 ") {
			t.Errorf("%s: shoal version prints %q", snapshotter, out)
		}
	}
	for _, d := range must(lab.Differences(s.mountImage(t, "overlayfs", imported), s.mountImage(t, "shoal", pushed), nil))(t) {
		t.Errorf("overlayfs and shoal differ: %s", d)
	}
	var config struct {
		Config struct {
			Entrypoint []string
			Labels     map[string]string
		}
	}
	noError(t, json.Unmarshal([]byte(must(s.Run(ctx, "skopeo", "inspect", "--config", "--tls-verify=false", "docker://"+pushed))(t)), &config))
	if e := config.Config.Entrypoint; len(e) != 1 || e[0] != "/usr/local/bin/shoal" || config.Config.Labels["org.opencontainers.image.version"] != "v1.2.3" {
		t.Errorf("the image's config: %+v", config.Config)
	}
}
