package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestImageFileSystem: kubelet hears of the node's directory, and of the whole size
// of an image, when hardly any of its bytes are there and none will come.
func TestImageFileSystem(t *testing.T) {
	eachContainerd(t, func(t *testing.T, v lab.ContainerdVersion) {
		s := newCRISite(t, v, "prefetch = \"none\"\n", func(s *site, o *lab.ContainerdOptions) {
			if v.ConfigVersion < 3 { // it does not know exports: docs/containerd.md
				noError(t, os.MkdirAll(s.Path("ctrd", "root"), 0o711))
				noError(t, os.Symlink(s.node.Root, s.Path("ctrd", "root", "io.containerd.snapshotter.v1.shoal")))
			}
		})
		ctx := t.Context()
		const size = 8 << 20
		ref := s.pushApp(t, "app", content(1, size))
		noError(t, s.CRI.Pull(ctx, ref, nil))
		if !s.isLazy(t, ctx, ref) {
			t.Fatalf("the image is not lazy: %s", logLine(t, s.node.Log, ref))
		}
		noError(t, s.supernode.Kill())
		noError(t, lab.WaitFor(ctx, "the image in kubelet's figures", time.Minute, func() error {
			fs, err := s.CRI.ImageFs(ctx)
			if err != nil {
				return err
			}
			if used := fs.GetUsedBytes().GetValue(); used < size {
				return fmt.Errorf("%d bytes used, want %d at least", used, size)
			}
			if fs.GetInodesUsed().GetValue() == 0 {
				return errors.New("no inodes used")
			}
			return nil
		}))
		if local, _, err := s.node.Local(ctx, ref); err != nil || local > size/2 {
			t.Errorf("%d bytes of the image are on the node (%v): this test is about bytes that are not", local, err)
		}
		at := must(s.CRI.ImageFs(ctx))(t).GetFsId().GetMountpoint()
		if real, err := filepath.EvalSymlinks(at); err != nil || real != s.node.Root {
			t.Errorf("kubelet hears of %s, which is %s (%v), want %s", at, real, err, s.node.Root)
		}
	})
}

// TestImageFileSystemIsDu: what kubelet learns of images, which containerd asks for once,
// soon after the pull, is what they take of the disk when all of their bytes are there.
func TestImageFileSystemIsDu(t *testing.T) {
	s := newCRISite(t, pinned(t), "prefetch = \"none\"\n", nil)
	ctx := t.Context()
	pause := s.registry.Addr + "/pause:v1"
	ref := s.push(t, "app", must(s.Guest())(t), layer(t, file("random", content(1, 48<<20))), layer(t, file("text", strings.Repeat("the same line\n", 1<<20)), file("small", "1")))
	for _, r := range []string{pause, ref} {
		noError(t, s.CRI.Pull(ctx, r, nil))
	}
	var bytes, inodes uint64
	look := func() error {
		fs, err := s.CRI.ImageFs(ctx)
		bytes, inodes = fs.GetUsedBytes().GetValue(), fs.GetInodesUsed().GetValue()
		return err
	}
	noError(t, lab.WaitFor(ctx, "the images in kubelet's figures", time.Minute, func() error {
		before := bytes
		if err := look(); err != nil {
			return err
		}
		if bytes < 48<<20 || bytes != before {
			return fmt.Errorf("%d bytes, and %d before", bytes, before)
		}
		time.Sleep(time.Second)
		return nil
	}))
	for _, r := range []string{pause, ref} {
		must(s.Run(ctx, "shoal", "prefetch", "--control", s.node.Control, "--local", r))(t)
	}
	first := bytes
	noError(t, look())
	if bytes != first {
		t.Errorf("%d bytes now that all are there, and %d before", bytes, first)
	}
	var du, files uint64
	noError(t, filepath.WalkDir(filepath.Join(s.node.Root, "diffs"), func(path string, _ fs.DirEntry, err error) error {
		var st syscall.Stat_t
		if err == nil {
			err = syscall.Lstat(path, &st)
		}
		du, files = du+uint64(st.Blocks)*512, files+1
		return err
	}))
	t.Logf("imageFs says %d bytes, du %d; %d inodes, and there are %d", bytes, du, inodes, files)
	if off := math.Abs(float64(bytes)/float64(du) - 1); off > 0.05 {
		t.Errorf("imageFs says %d bytes, and du %d: %.1f %% off", bytes, du, off*100)
	}
	if off := math.Abs(float64(inodes) - float64(files)); off > 0.1*float64(files) {
		t.Errorf("imageFs says %d inodes, and there are %d", inodes, files)
	}
}

// TestTwoRuntimeHandlers: an image that is lazy can be run by a runtime handler with
// another snapshotter once it has been pulled for that one, too, and so can the
// sandbox's; and the lazy ones go on.
func TestTwoRuntimeHandlers(t *testing.T) {
	s := newCRISite(t, pinned(t), "", func(_ *site, o *lab.ContainerdOptions) {
		o.CRI.Handlers = map[string]string{"plain": "overlayfs"}
	})
	ctx := t.Context()
	ref := s.pushApp(t, "app", bigContent(1))
	noError(t, s.CRI.Pull(ctx, ref, nil))
	lazy, _ := s.run(t, "lazy", ref, lab.PodOptions{})
	for _, r := range []string{ref, s.registry.Addr + "/pause:v1"} {
		must(s.Ctr(ctx, "-n", "k8s.io", "images", "pull", "--snapshotter", "overlayfs", r))(t)
	}
	plain, c := s.run(t, "plain", ref, lab.PodOptions{Handler: "plain"})
	if got := must(c.Exec(ctx, "/guest", "cat", "/data"))(t); got != bigContent(1) {
		t.Error("the container of the other snapshotter reads other content than was pushed")
	}
	noError(t, lazy.Remove(ctx))
	lazy, c = s.run(t, "lazy2", ref, lab.PodOptions{})
	if got := must(c.Exec(ctx, "/guest", "cat", "/data"))(t); got != bigContent(1) {
		t.Error("the lazy container reads other content than was pushed")
	}
	noError(t, lazy.Remove(ctx))
	noError(t, plain.Remove(ctx))
}

// TestSwitchFromOverlayfs: a machine that has run images with overlayfs and has
// thrown the layers' bytes away (discard_unpacked_layers) is switched to shoal: the
// images that it has run at once, lazily.
func TestSwitchFromOverlayfs(t *testing.T) {
	s := newCRISite(t, pinned(t), "", func(_ *site, o *lab.ContainerdOptions) {
		o.CRI.Snapshotter, o.CRI.DiscardUnpacked = "overlayfs", true
	})
	ctx := t.Context()
	ref := s.pushApp(t, "app", bigContent(1))
	noError(t, s.CRI.Pull(ctx, ref, nil))
	pod, _ := s.run(t, "before", ref, lab.PodOptions{})
	noError(t, pod.Remove(ctx))
	noError(t, s.Containerd.Stop())
	noError(t, s.Containerd.Reconfigure(func(o *lab.ContainerdOptions) {
		o.CRI.Snapshotter, o.CRI.DiscardUnpacked = "shoal", false
	}))
	noError(t, s.Containerd.Restart(ctx))
	pod, c := s.run(t, "after", ref, lab.PodOptions{})
	if got := must(c.Exec(ctx, "/guest", "cat", "/data"))(t); got != bigContent(1) {
		t.Error("the container reads other content than was pushed")
	}
	if !s.isLazy(t, ctx, ref) {
		t.Errorf("the image is not lazy: %s", logLine(t, s.node.Log, ref))
	}
	noError(t, pod.Remove(ctx))
}

// TestContainerdStartsWithoutNode: containerd starts while the node is away. It
// answers, and once the node is back and the image has been touched, the image is
// there and runs.
func TestContainerdStartsWithoutNode(t *testing.T) {
	s := newCRISite(t, pinned(t), "", nil)
	ctx := t.Context()
	ref := s.pushApp(t, "app", bigContent(1))
	pause := s.registry.Addr + "/pause:v1"
	noError(t, s.CRI.Pull(ctx, ref, nil))
	noError(t, s.CRI.Pull(ctx, pause, nil))
	noError(t, s.Containerd.Stop())
	noError(t, s.node.Kill())
	noError(t, s.Containerd.Restart(ctx))
	must(s.CRI.Images(ctx))(t)
	s.node = must(s.RestartNode(ctx, s.node))(t)
	for _, r := range []string{ref, pause} { // an event, which CRI looks at images for
		must(s.Ctr(ctx, "-n", "k8s.io", "images", "label", r, "lab.test/touched=1"))(t)
	}
	noError(t, lab.WaitFor(ctx, "the images in CRI's list", 20*time.Second, func() error {
		refs, err := s.CRI.Images(ctx)
		if err == nil && (!slices.Contains(refs, ref) || !slices.Contains(refs, pause)) {
			err = fmt.Errorf("it has %q", refs)
		}
		return err
	}))
	var pod *lab.Pod
	noError(t, lab.WaitFor(ctx, "a pod", time.Minute, func() (err error) { // containerd dials the node again in its own time
		pod, err = s.CRI.RunPod(ctx, "pod", lab.PodOptions{})
		return err
	}))
	c := must(pod.Start(ctx, "main", ref, "/guest", "pause"))(t)
	if got := must(c.Exec(ctx, "/guest", "cat", "/data"))(t); got != bigContent(1) {
		t.Error("the container reads other content than was pushed")
	}
	noError(t, pod.Remove(ctx))
}

// TestPodEndsWhileItWaitsForBytes: a pod whose process waits for bytes that do not
// come can be killed, and also one that reads while the node is stopped.
func TestPodEndsWhileItWaitsForBytes(t *testing.T) {
	// Nothing below is over since a read has failed.
	s := newCRISite(t, pinned(t), "read_timeout = \"1h\"\nprefetch = \"none\"\n", nil)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	ref := s.push(t, "app", must(s.Guest())(t), layer(t, file("one", content(1, 8<<20)), file("two", content(2, 8<<20))))
	noError(t, s.CRI.Pull(ctx, ref, nil))
	first, one := s.run(t, "first", ref, lab.PodOptions{})
	second, two := s.run(t, "second", ref, lab.PodOptions{})
	must(one.Exec(ctx, "/guest", "stat", "/one"))(t) // the program is there
	noError(t, s.registry.Stop())
	noError(t, s.supernode.Kill())
	var reads [2]chan error
	read := func(i int, c *lab.PodContainer, name string) {
		reads[i] = make(chan error, 1)
		go func() {
			_, err := c.Exec(ctx, "/guest", "sum", name)
			reads[i] <- err
		}()
	}
	waiting := func(n float64) {
		noError(t, lab.WaitFor(ctx, "a read that waits", 30*time.Second, func() error {
			got, err := s.node.Metric(ctx, "shoal_node_reads_in_flight")
			if err == nil && got < n {
				err = fmt.Errorf("%v reads wait", got)
			}
			return err
		}))
	}
	read(0, one, "/one")
	waiting(1)
	noError(t, first.Remove(ctx))
	if err := <-reads[0]; err == nil {
		t.Error("the read has ended well without its bytes")
	}
	read(1, two, "/two")
	waiting(1)
	noError(t, syscall.Kill(s.node.Pid(), syscall.SIGSTOP))
	err := second.Stop(ctx)
	noError(t, syscall.Kill(s.node.Pid(), syscall.SIGCONT))
	noError(t, err)
	if err := <-reads[1]; err == nil {
		t.Error("the read has ended well without its bytes")
	}
	noError(t, second.Remove(ctx))
}
