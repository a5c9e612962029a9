package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestTwoContainerds: a second containerd on one node is refused, is told why, and
// removes nothing of the first one's; it may come once the first has ended.
func TestTwoContainerds(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	ref := s.push(t, "app", layer(t, dir("bin/"), file("bin/true", bigContent(1))))
	noError(t, s.Pull(ctx, "shoal", ref))
	other := must(s.StartContainerd(ctx, "other", lab.ContainerdOptions{Shoal: s.node.Socket, ShoalRoot: s.node.Root}))(t)
	if _, err := other.Ctr(ctx, "snapshots", "--snapshotter", "shoal", "prepare", "mine"); err == nil || !strings.Contains(err.Error(), "uses this node already") {
		t.Errorf("a snapshot of the second containerd: %v", err)
	}
	// Its garbage collector.
	_, _ = other.Ctr(ctx, "leases", "create", "--id", "x")
	_, _ = other.Ctr(ctx, "leases", "delete", "--sync", "x")
	if !s.isLazy(t, ctx, ref) {
		t.Error("the first containerd's image is gone")
	}
	if log := string(must(os.ReadFile(s.node.Log))(t)); !strings.Contains(log, "a second program uses this node's snapshotter") {
		t.Error("the node's log does not name the second containerd")
	}
	noError(t, s.Containerd.Stop())
	_, err := other.Ctr(ctx, "snapshots", "--snapshotter", "shoal", "prepare", "mine")
	noError(t, err)
}

// k8s runs ctr in the namespace of Kubernetes.
func (s *site) k8s(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return s.Ctr(t.Context(), append([]string{"--namespace", "k8s.io"}, args...)...)
}

// TestOtherSnapshotter: a lazy image cannot be run with another snapshotter, neither
// by a runtime handler of its own nor after a way back to overlayfs, until its layers
// have been pulled for that one, too; the commands of docs/limits.md do it.
func TestOtherSnapshotter(t *testing.T) {
	pinned := (&lab.Lab{Bin: bin(t)}).ContainerdVersions()[0]
	s := newCRISite(t, pinned, "", func(_ *site, o *lab.ContainerdOptions) {
		o.CRI.Handlers = map[string]string{"plain": "overlayfs"}
	})
	ctx := t.Context()
	ref := s.pushApp(t, "app", "data")
	noError(t, s.CRI.Pull(ctx, ref, nil))
	s.run(t, "lazy", ref, lab.PodOptions{})
	if _, err := s.CRI.RunPod(ctx, "plain", lab.PodOptions{Handler: "plain"}); err == nil || !strings.Contains(err.Error(), "content digest") {
		t.Errorf("a pod whose pause image is lazy, with overlayfs: %v; do the documented limits still hold?", err)
	}
	for _, r := range must(s.CRI.Images(ctx))(t) {
		_, err := s.k8s(t, "images", "pull", "--snapshotter", "overlayfs", r)
		noError(t, err)
	}
	_, c := s.run(t, "plain", ref, lab.PodOptions{Handler: "plain"})
	if got := must(c.Exec(ctx, "/guest", "cat", "/data"))(t); got != "data" {
		t.Errorf("the container reads %q", got)
	}
	// The way back: overlayfs for all.
	noError(t, s.Containerd.Stop())
	noError(t, s.Reconfigure(func(o *lab.ContainerdOptions) { o.CRI.Snapshotter = "overlayfs" }))
	noError(t, s.Containerd.Restart(ctx))
	s.run(t, "back", ref, lab.PodOptions{})
}

// TestContainerdWithoutNode: CRI forgets the images of a snapshotter that is away when
// containerd starts; the command of docs/limits.md has it look again.
func TestContainerdWithoutNode(t *testing.T) {
	pinned := (&lab.Lab{Bin: bin(t)}).ContainerdVersions()[0]
	s := newCRISite(t, pinned, "", nil)
	ctx := t.Context()
	ref := s.pushApp(t, "app", "data")
	noError(t, s.CRI.Pull(ctx, ref, nil))
	noError(t, s.Containerd.Stop())
	noError(t, s.node.Stop())
	noError(t, s.Containerd.Restart(ctx))
	if refs := must(s.CRI.Images(ctx))(t); len(refs) != 0 {
		t.Errorf("CRI lists %q with the node away; do the documented limits still hold?", refs)
	}
	s.node = must(s.RestartNode(ctx, s.node))(t)
	noError(t, lab.WaitFor(ctx, "containerd's connection to the node", 30*time.Second, func() error {
		_, err := s.k8s(t, "snapshots", "--snapshotter", "shoal", "ls")
		return err
	}))
	list, err := s.k8s(t, "images", "ls", "-q")
	noError(t, err)
	for _, r := range strings.Fields(list) {
		_, err := s.k8s(t, "images", "label", r, "shoal.seen=1")
		noError(t, err)
	}
	noError(t, lab.WaitFor(ctx, "CRI lists the image again", 20*time.Second, func() error {
		refs, err := s.CRI.Images(ctx)
		if err == nil && len(refs) == 0 {
			err = fmt.Errorf("no image")
		}
		return err
	}))
	s.run(t, "pod", ref, lab.PodOptions{})
}

// TestImageFs: what kubelet is told that images take is right from the start, as of an
// image all of which is here, and names the disk that it is on.
func TestImageFs(t *testing.T) {
	eachContainerd(t, testImageFs)
}

func testImageFs(t *testing.T, v lab.ContainerdVersion) {
	s := newCRISite(t, v, "", nil)
	at := s.node.Root
	if v.ConfigVersion < 3 {
		// 1.6 does not ask for it. Operators are told to make a link of this name.
		at = filepath.Join(s.Containerd.Root, "io.containerd.snapshotter.v1.shoal")
	}
	ctx := t.Context()
	ref := s.pushApp(t, "app", strings.Repeat(bigContent(1), 4))
	noError(t, s.CRI.Pull(ctx, ref, nil))
	all := usage(t, s)
	var told uint64
	noError(t, lab.WaitFor(ctx, "figures of the image", time.Minute, func() error {
		fs, err := s.CRI.ImageFs(ctx)
		if err != nil {
			return err
		}
		if fs.FsId.Mountpoint != at {
			t.Fatalf("images are said to be at %s, want %s", fs.FsId.Mountpoint, at)
		}
		// containerd looks every ten seconds, also while not all layers are there.
		if told = fs.UsedBytes.Value; told < all || fs.InodesUsed.Value == 0 {
			return fmt.Errorf("%d bytes of %d, %d inodes", told, all, fs.InodesUsed.Value)
		}
		return nil
	}))
	s.run(t, "pod", ref, lab.PodOptions{})
	noError(t, s.node.WaitProven(ctx, ref, time.Minute))
	var took uint64
	noError(t, filepath.WalkDir(filepath.Join(s.node.Root, "diffs"), func(_ string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			took += uint64(st.Blocks) * 512
		}
		return nil
	}))
	t.Logf("%d bytes told before the start, %d taken with all of it here", told, took)
	if told < took*9/10 || told > took*11/10 {
		t.Errorf("kubelet was told %d bytes, and the image takes %d", told, took)
	}
}

// usage is the sum of what shoal says of each snapshot, in bytes.
func usage(t *testing.T, s *site) (sum uint64) {
	t.Helper()
	out := must(s.Containerd.Ctr(t.Context(), "-n", "k8s.io", "snapshots", "--snapshotter", "shoal", "usage", "-b"))(t)
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 3 && f[0] != "KEY" {
			sum += must(strconv.ParseUint(f[1], 10, 64))(t)
		}
	}
	return sum
}
