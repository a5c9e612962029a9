package integration

import (
	"archive/tar"
	"os"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/integration/lab"
)

// userNamespaces are ranges of ids as kubelet hands them out: up to 2^32.
var userNamespaces = []string{"0:100000:65536", "0:2914516992:65536"}

// lookAtOwners prints the owner of what the image holds, and of what is written.
const lookAtOwners = `stat -c '%u:%g %n' / /bin /bin/sh /own; echo x > /new && stat -c '%u:%g %n' /new; cat /proc/self/uid_map`

// TestUserNamespaces: containers with user namespaces start lazily, without a copy
// of the image and with the right owners, two ranges of one image at once; so do
// those of images that were unpacked in the ordinary way.
func TestUserNamespaces(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	layers := []lab.Blob{
		toolsLayer(t, "sh", "stat", "cat", "sleep"),
		layer(t, file("own", "mine").with(func(h *tar.Header) { h.Uid, h.Gid = 7, 8 }), file("big", bigContent(3))),
	}
	lazy := s.push(t, "lazy", layers...)
	noError(t, s.Pull(ctx, "shoal", lazy))
	if !s.isLazy(t, ctx, lazy) {
		t.Fatal("the image is not lazy")
	}
	s.lookAtOwners(t, lazy)
	if n := s.copied(t); n > 1<<20 {
		t.Errorf("%d bytes of the image were copied", n)
	}

	noError(t, s.supernode.Stop())
	ordinary := s.push(t, "ordinary", append(layers, layer(t, file("more", "more")))...)
	noError(t, s.Pull(ctx, "shoal", ordinary))
	if s.isLazy(t, ctx, ordinary) {
		t.Fatal("the image is lazy without a supernode")
	}
	s.lookAtOwners(t, ordinary)
}

// TestUserNamespacesWithoutCapability: where containerd's config lacks the capability
// "remap-ids", containers with user namespaces get a copy, which is slow, but they
// start, their files have the right owners, and the log says what to do.
func TestUserNamespacesWithoutCapability(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	noError(t, s.Containerd.Stop())
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket, ShoalRoot: s.node.Root, NoRemap: true}))(t)
	ref := s.push(t, "lazy", toolsLayer(t, "sh", "stat", "cat"),
		layer(t, file("own", "mine").with(func(h *tar.Header) { h.Uid, h.Gid = 7, 8 })))
	noError(t, s.Pull(ctx, "shoal", ref))
	s.lookAtOwners(t, ref)
	if log := string(must(os.ReadFile(s.node.Log))(t)); !strings.Contains(log, "remap-ids") {
		t.Errorf("the log does not say how to avoid the copy:\n%s", lab.Tail(s.node.Log, 10))
	}
}

// lookAtOwners runs a container in each of the user namespaces.
func (s *site) lookAtOwners(t *testing.T, ref string) {
	t.Helper()
	for _, ids := range userNamespaces {
		host := strings.Split(ids, ":")[1]
		out, err := s.sh(t, "shoal", ref, lookAtOwners, "--remap-labels", "--uidmap", ids, "--gidmap", ids)
		noError(t, err)
		for _, want := range []string{"0:0 /\n", "0:0 /bin\n", "0:0 /bin/sh\n", "7:8 /own\n", "0:0 /new\n", host} {
			if !strings.Contains(out, want) {
				t.Errorf("%s, ids %s: the container does not see %q:\n%s", ref, ids, want, out)
			}
		}
	}
}
