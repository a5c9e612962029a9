package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/integration/lab"
)

// unread counts the files that cannot be read, or have other bytes, with cold caches.
func unread(t *testing.T, files []lab.Checked) (n int) {
	t.Helper()
	for _, c := range files {
		f, err := os.Open(c.Path)
		if err == nil {
			err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		}
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, len(c.Data))
		if _, err := f.ReadAt(b, 0); err != nil || !bytes.Equal(b, c.Data) {
			n++
		}
		noError(t, f.Close())
	}
	return n
}

// under returns the same files below another mount of the image.
func under(dir string, files []lab.Checked, old string) (moved []lab.Checked) {
	for _, f := range files {
		f.Path = filepath.Join(dir, strings.TrimPrefix(f.Path, old))
		moved = append(moved, f)
	}
	return moved
}

// TestDrillOrphan ends node and keep for good once every layer is complete. Whoever
// has mounted the image since then reads on. So does whoever has mounted it before,
// from the page cache; what is not there is lost to him, but with loop devices.
func TestDrillOrphan(t *testing.T) {
	for _, mode := range []string{"file", "loop"} {
		t.Run(mode, func(t *testing.T) { drillOrphan(t, mode) })
	}
}

func drillOrphan(t *testing.T, mode string) {
	drill := fmt.Sprintf("node and keep killed for good, every layer complete, mount = %q", mode)
	s := newKeptSiteWith(t, fmt.Sprintf("mount = %q\n", mode), 0)
	ctx := t.Context()
	ref, before := s.pullFiles(t, "app", 1, 32, 300_000)
	old := before[0].Path[:strings.LastIndex(before[0].Path, "d0/")]
	if n := unread(t, before[:4]); n > 0 {
		t.Fatalf("%d of 4 files cannot be read with all well", n)
	}
	noError(t, s.node.WaitLocal(ctx, ref, time.Minute))
	native := func() error {
		for _, im := range must(s.node.Status(ctx))(t).Images {
			for _, l := range im.Layers {
				if l.Mount != "native" {
					return errors.New("a complete layer is mounted " + l.Mount)
				}
			}
		}
		return nil
	}
	noError(t, lab.WaitFor(ctx, "native mounts", 20*time.Second, native))
	since := under(s.mountImage(t, "shoal", ref), before, old)

	pid := must(s.node.Child())(t)
	noError(t, s.node.Kill()) // keep first, so that it starts no other node
	noError(t, syscall.Kill(pid, syscall.SIGKILL))
	noError(t, lab.WaitFor(ctx, "end of the node", 10*time.Second, func() error {
		// Empty, for one that has ended and that nobody has waited for.
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && len(b) > 0 {
			return errors.New("it is still there")
		}
		return nil
	}))
	count(t, drill+": files that cannot be read by who has mounted the image since", unread(t, since))
	lost := unread(t, before)
	t.Logf("%s: %d of %d files cannot be read by who has mounted it before", mode, lost, len(before))
	if row := drill + ": files that cannot be read by who has mounted it before, with cold caches"; mode == "loop" {
		count(t, row, lost)
	} else {
		figure(t, row, "files", "", 0, float64(lost))
	}

	s.node = must(s.RestartNode(ctx, s.node))(t)
	noError(t, lab.WaitFor(ctx, "native mounts", 20*time.Second, native))
	count(t, drill+": files that cannot be read by who has mounted the image since, once there is a node again", unread(t, since))
}

// TestEmptiedRoot: the node's directory is emptied, and containerd's is not. The log
// says what to do, and that helps.
func TestEmptiedRoot(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	ref := s.push(t, "app", layer(t, dir("a/"), file("a/f", content(1, 100_000))), layer(t, dir("b/"), file("b/f", content(2, 100_000))))
	noError(t, s.Pull(ctx, "shoal", ref))
	if err := s.node.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, m := range must(s.Mounts())(t) {
		if strings.HasPrefix(m, s.node.Root) {
			noError(t, unix.Unmount(m, unix.MNT_DETACH))
		}
	}
	noError(t, os.RemoveAll(s.node.Root))
	s.node = must(s.RestartNode(ctx, s.node))(t)
	if err := s.Pull(ctx, "shoal", ref); err == nil {
		t.Log("containerd has healed by itself")
	} else if log := string(must(os.ReadFile(s.node.Log))(t)); !strings.Contains(log, "containerd asks for a snapshot that is not here") || !strings.Contains(log, "crictl rmi IMAGE") {
		t.Errorf("pull: %v; and the log does not say what to do:\n%s", err, lab.Tail(s.node.Log, 15))
	}
	must(s.Ctr(ctx, "images", "rm", "--sync", ref))(t)
	noError(t, s.Pull(ctx, "shoal", ref))
	if !s.isLazy(t, ctx, ref) {
		t.Error("the image is not lazy")
	}
	view := s.mountImage(t, "shoal", ref)
	if b, err := os.ReadFile(filepath.Join(view, "b/f")); err != nil || string(b) != content(2, 100_000) {
		t.Errorf("read: %v, or other bytes", err)
	}
}
