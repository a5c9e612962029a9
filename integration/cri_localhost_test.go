package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestLocalhostIsThisMachine: an image whose reference names a registry on loopback is that
// of the machine that pulls it, also where the supernode's machine has a registry at the
// same address with another image of that name. The supernode is not asked for it, by the
// mirror or in Prepare. Images with other names are lazy as ever.
func TestLocalhostIsThisMachine(t *testing.T) {
	eachContainerd(t, func(t *testing.T, v lab.ContainerdVersion) { testLocalhost(t, v, true) })
	t.Run("no mirror", func(t *testing.T) { testLocalhost(t, pinned(t), false) })
}

func testLocalhost(t *testing.T, v lab.ContainerdVersion, mirror bool) {
	ctx := t.Context()
	s := &site{Lab: newLab(t)}
	net := must(s.NewNet(ctx, 1))(t)
	far, near := must(net.NewHost(ctx, "super", 0, 0))(t), must(net.NewHost(ctx, "node", 0, 0))(t)
	const local = "127.0.0.1:5000"
	theirs := must(s.At(far).StartRegistryAt(ctx, "theirs", local, s.Path("theirs"), ""))(t)
	shared := must(s.At(far).StartRegistry(ctx, "shared", s.Path("shared"), ""))(t)
	own := must(s.At(near).StartRegistryAt(ctx, "own", local, s.Path("own"), ""))(t)
	certs := s.Path("certs", shared.Addr)
	noError(t, os.MkdirAll(certs, 0o700))
	plain := fmt.Appendf(nil, "[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", "http://"+shared.Addr)
	noError(t, os.WriteFile(filepath.Join(certs, "hosts.toml"), plain, 0o600))
	s.supernode = must(s.At(far).StartSupernode(ctx, "super", fmt.Sprintf("registry.config_path = %q\n", s.Path("certs"))))(t)
	s.node = must(s.At(near).StartNode(ctx, "node", s.supernode.Address, ""))(t)

	guest := must(s.Guest())(t)
	push := func(r *lab.Registry, data string) {
		must(r.Push(ctx, "app", "v1", []string{"/guest", "pause"}, guest, layer(t, file("data", data))))(t)
	}
	push(theirs, "the supernode's machine\n")
	push(own, "this machine\n")
	push(shared, "all machines\n")
	o := lab.ContainerdOptions{
		Binary: v.Binary, ConfigVersion: v.ConfigVersion, Shoal: s.node.Socket, ShoalRoot: s.node.Root,
		CRI: &lab.CRIOptions{Pause: must(own.PushPause(ctx))(t)},
	}
	if mirror {
		o.Mirror, o.MirrorCA = s.node.Mirror, s.node.MirrorCA
	}
	s.Containerd = must(s.At(near).StartContainerd(ctx, "ctrd", o))(t)
	certs = s.Path("ctrd", "certs.d", shared.Addr)
	noError(t, os.MkdirAll(certs, 0o700))
	var hosts []byte
	if mirror {
		hosts = must(os.ReadFile(s.Path("ctrd", "certs.d", "_default", "hosts.toml")))(t)
	}
	noError(t, os.WriteFile(filepath.Join(certs, "hosts.toml"), append(hosts, plain...), 0o600))

	asked := must(theirs.Requests(ctx))(t)
	for i, c := range []struct {
		host, data string
		lazy       bool
	}{
		{local, "this machine\n", false},
		{strings.Replace(local, "127.0.0.1", "localhost", 1), "this machine\n", false},
		{shared.Addr, "all machines\n", true},
	} {
		ref := c.host + "/app:v1"
		noError(t, s.CRI.Pull(ctx, ref, nil))
		if lazy := s.isLazy(t, ctx, ref); lazy != c.lazy {
			t.Errorf("%s is lazy: %v", ref, lazy)
		}
		_, container := s.run(t, fmt.Sprint("pod", i), ref, lab.PodOptions{})
		if got := must(container.Exec(ctx, "/guest", "cat", "/data"))(t); got != c.data {
			t.Errorf("of %s the image runs that has %q in it, want %q", ref, got, c.data)
		}
	}
	if n := must(theirs.Requests(ctx))(t); n != asked {
		t.Errorf("the registry on loopback of the supernode's machine was asked %d times", n-asked)
	}
}
