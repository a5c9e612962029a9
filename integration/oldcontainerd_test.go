package integration

import (
	"context"
	"os/exec"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestOldContainerd uses the containerd of Debian 12 (1.6), as nerdctl and CRI
// do: the client adds the labels that say which image a layer belongs to.
func TestOldContainerd(t *testing.T) {
	bin(t) // skips without root
	const program = "/usr/bin/containerd"
	out, err := exec.CommandContext(t.Context(), program, "--version").Output()
	if err != nil {
		t.Fatalf("%v: `make setup` installs Debian's containerd", err)
	}
	t.Logf("%s", strings.TrimSpace(string(out)))
	s := newRealSite(t, "")
	noError(t, s.Containerd.Stop()) // one at a time may use a node
	old := must(s.StartContainerd(t.Context(), "old", lab.ContainerdOptions{Binary: program, ConfigVersion: 2, Shoal: s.node.Socket, ShoalRoot: s.node.Root}))(t)
	client := must(containerd.New(old.Address))(t)
	t.Cleanup(func() { _ = client.Close() })
	ctx := namespaces.WithNamespace(context.WithoutCancel(t.Context()), "default")
	ref := s.link.Addr + "/redis:v1"
	plain := docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost))})
	_, err = client.Pull(ctx, ref, containerd.WithPullUnpack, containerd.WithPullSnapshotter("shoal"),
		containerd.WithResolver(plain), containerd.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(ref)))
	if err != nil {
		t.Fatal(err)
	}
	if !s.isLazy(t, ctx, ref) {
		t.Fatal("the image is not lazy")
	}
	must(old.RunReady(ctx, "shoal", ref, false))(t)
}
