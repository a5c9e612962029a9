package integration

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// realSite is a site whose registry has real images, redis and debian, behind a
// link that counts.
type realSite struct {
	*site
	link     *lab.Link // to the registry
	nodeLink *lab.Link // to the supernode
}

func newRealSite(t *testing.T, supernodeConfig string) *realSite {
	t.Helper()
	s := &realSite{site: &site{Lab: newLab(t)}}
	s.registry = realRegistry(t, s.Lab, "redis")
	s.link = must(s.NewLink(s.registry.Addr, 0, 0))(t)
	s.supernode = must(s.StartSupernode(t.Context(), "super", supernodeConfig))(t)
	s.nodeLink = must(s.NewLink(s.supernode.HostPort(), 0, 0))(t)
	s.node = must(s.StartNode(t.Context(), "node", s.supernode.Via(s.nodeLink), ""))(t)
	s.Containerd = must(s.StartContainerd(t.Context(), "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket, ShoalRoot: s.node.Root}))(t)
	return s
}

// TestLazyStart is the whole story: with a warm supernode a pull moves no layer
// bytes, to the supernode or to the node; the image runs; the rest follows; and
// what is mounted afterwards equals what overlayfs unpacks.
func TestLazyStart(t *testing.T) {
	s := newRealSite(t, "")
	ctx := t.Context()
	ref := s.link.Addr + "/redis:v1"
	must(s.Run(ctx, "shoal", "prefetch", "--control", s.supernode.Control, ref))(t)
	registry, node := s.link.Down(), s.nodeLink.Down()
	fetched := must(lab.Metric(ctx, s.node.Metrics, "shoal_node_fetched_bytes_total"))(t)
	if err := s.Pull(ctx, "shoal", ref); err != nil {
		t.Fatal(err)
	}
	// Indexes of 66 MB of layers, manifest and config: well below a megabyte each.
	if n := s.link.Down() - registry; n > 200<<10 {
		t.Errorf("%d bytes came from the registry during the pull", n)
	}
	if n := s.nodeLink.Down() - node; n > 1<<20 {
		t.Errorf("%d bytes came to the node during the pull", n)
	}
	if n := must(lab.Metric(ctx, s.node.Metrics, "shoal_node_fetched_bytes_total"))(t); n != fetched {
		t.Errorf("%v bytes of layers reached the node during the pull, before anything ran", n-fetched)
	}
	if !s.isLazy(t, ctx, ref) {
		t.Fatal("the image is not lazy")
	}
	must(s.RunReady(ctx, "shoal", ref, false))(t)
	if err := s.node.WaitLocal(ctx, ref, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := s.Pull(ctx, "overlayfs", ref); err != nil {
		t.Fatal(err)
	}
	for _, d := range must(lab.Differences(s.mountImage(t, "overlayfs", ref), s.mountImage(t, "shoal", ref), nil))(t) {
		t.Errorf("overlayfs and shoal differ: %s", d)
	}
}

// TestRestart: a node that was killed serves again what it had, mounts what is
// complete without FUSE, and has forgotten nothing.
func TestRestart(t *testing.T) {
	s := newRealSite(t, "")
	ctx := t.Context()
	ref := s.link.Addr + "/redis:v1"
	if err := s.Pull(ctx, "shoal", ref); err != nil {
		t.Fatal(err)
	}
	must(s.RunReady(ctx, "shoal", ref, false))(t)
	if err := s.node.WaitLocal(ctx, ref, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := s.node.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.supernode.Kill(); err != nil {
		t.Fatal(err)
	}
	s.node = must(s.RestartNode(ctx, s.node))(t)
	must(s.RunReady(ctx, "shoal", ref, false))(t) // the supernode is gone: everything is local
	st := must(s.node.Status(ctx))(t)
	if len(st.Images) != 1 {
		t.Fatalf("after the restart the node lists %d images, want 1", len(st.Images))
	}
	for _, l := range st.Images[0].Layers {
		if l.Mount != "native" || l.Local != l.Size {
			t.Errorf("layer %s: %d of %d bytes local, mounted %q; want all, native", l.DiffID, l.Local, l.Size, l.Mount)
		}
	}
}

// TestRemoveImageFreesItsBytes: when nobody uses a layer any more, its mount and
// its bytes go; layers that another image has stay.
func TestRemoveImageFreesItsBytes(t *testing.T) {
	s := newRealSite(t, "")
	ctx := t.Context()
	v1, v2 := s.link.Addr+"/redis:v1", s.link.Addr+"/redis:v2"
	for _, ref := range []string{v1, v2} {
		if err := s.Pull(ctx, "shoal", ref); err != nil {
			t.Fatal(err)
		}
	}
	must(s.RunReady(ctx, "shoal", v2, false))(t)
	must(s.Ctr(ctx, "images", "rm", "--sync", v1))(t)
	must(s.RunReady(ctx, "shoal", v2, false))(t) // v2 shares all but one layer with v1
	must(s.Ctr(ctx, "images", "rm", "--sync", v2))(t)
	err := lab.WaitFor(ctx, "bytes and mounts of removed images gone", 20*time.Second, func() error {
		// containerd collects in its own time; asking for a removal prompts it.
		left, err := filepath.Glob(filepath.Join(s.node.Root, "diffs", "*"))
		if err != nil {
			return err
		}
		mounts, err := s.Mounts()
		if err != nil {
			return err
		}
		var erofs []string
		for _, m := range mounts {
			if strings.Contains(m, "/m/") {
				erofs = append(erofs, m)
			}
		}
		if len(left) > 0 || len(erofs) > 0 {
			return &leftError{left, erofs}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

type leftError struct{ diffs, mounts []string }

func (e *leftError) Error() string {
	return "left: " + strings.Join(append(e.diffs, e.mounts...), " ")
}

// TestNoSupernode: with nobody to ask, images are unpacked in the ordinary way,
// at once, and the log says why.
func TestNoSupernode(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	if err := s.supernode.Stop(); err != nil {
		t.Fatal(err)
	}
	ref := s.push(t, "app", layer(t, dir("bin/"), file("bin/true", bigContent(1))))
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := s.Pull(ctx, "shoal", ref); err != nil {
		t.Fatal(err)
	}
	view := s.mountImage(t, "shoal", ref)
	if got := string(must(os.ReadFile(filepath.Join(view, "bin/true")))(t)); got != bigContent(1) {
		t.Error("the unpacked file has other content")
	}
	log := string(must(os.ReadFile(s.node.Log))(t))
	if !strings.Contains(log, ref) {
		t.Errorf("the node's log does not name %s and say why it is not lazy:\n%s", ref, log)
	}
}
