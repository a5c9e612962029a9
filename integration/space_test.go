package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/integration/lab"
)

// smallDisk mounts a tmpfs of so many megabytes at dir.
func smallDisk(t *testing.T, dir string, megabytes int) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", megabytes)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The lab's processes have the mounts below it; they end after the test.
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func growDisk(t *testing.T, dir string, megabytes int) {
	t.Helper()
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, fmt.Sprintf("size=%dm", megabytes)); err != nil {
		t.Fatal(err)
	}
}

// diskUse is what directories take of the disk, as the file system counts.
func diskUse(t *testing.T, dirs ...string) (n int64) {
	t.Helper()
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			var st unix.Stat_t
			if err == nil {
				err = unix.Lstat(path, &st)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			n += st.Blocks * 512
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	return n
}

// TestNodeDiskFull: with a disk that has no room for an image its containers read
// right bytes all the same, the log says so once, and when there is room again
// the rest of it comes by itself.
func TestNodeDiskFull(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	root := s.Path("node", "r")
	smallDisk(t, root, 24)
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	s.node = must(s.StartNode(ctx, "node", s.supernode.Address, ""))(t)
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	one, a := noisy(t, "a", 11, 40)
	ref := s.push(t, "app", one)
	if err := s.Pull(ctx, "shoal", ref); err != nil {
		t.Fatal(err)
	}
	view := s.mountImage(t, "shoal", ref)
	expectFile(t, filepath.Join(view, "a"), a)
	if n := s.nodeMetric(t, "shoal_node_demand_failures_total"); n != 0 {
		t.Errorf("%v reads failed", n)
	}
	if n := s.nodeMetric(t, "shoal_node_not_kept_bytes_total"); n == 0 {
		t.Error("no bytes passed through")
	}
	log := string(must(os.ReadFile(s.node.Log))(t))
	if n := strings.Count(log, "the cache is full"); n != 1 {
		t.Errorf("the log says %d times that the cache is full", n)
	}
	growDisk(t, root, 200)
	if err := s.node.WaitLocal(ctx, ref, time.Minute); err != nil {
		t.Error(err)
	}
	expectFile(t, filepath.Join(s.mountImage(t, "shoal", ref), "a"), a)
}

// TestSupernodeDiskFull: what does not fit is not lazy, and the node is told why;
// what is stored goes on; with room, all goes on by itself.
func TestSupernodeDiskFull(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	root := s.Path("super")
	smallDisk(t, root, 48)
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	s.node = must(s.StartNode(ctx, "node", s.supernode.Address, ""))(t)
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	small, a := noisy(t, "a", 21, 2)
	big, b := noisy(t, "b", 22, 60)
	smallRef, bigRef := s.push(t, "small", small), s.push(t, "big", big)
	if err := s.Pull(ctx, "shoal", smallRef); err != nil {
		t.Fatal(err)
	}
	if err := s.Pull(ctx, "shoal", bigRef); err != nil {
		t.Fatal(err) // in the ordinary way
	}
	if s.isLazy(t, ctx, bigRef) {
		t.Error("an image that does not fit is lazy")
	}
	if line := logLine(t, s.node.Log, bigRef); !strings.Contains(line, "no space left") {
		t.Errorf("the node does not say why: %s", line)
	}
	expectFile(t, filepath.Join(s.mountImage(t, "shoal", bigRef), "b"), b)
	expectFile(t, filepath.Join(s.mountImage(t, "shoal", smallRef), "a"), a)
	growDisk(t, root, 400)
	err := lab.WaitFor(ctx, "the image stored once there is room", time.Minute, func() error {
		_, err := s.Run(ctx, "shoal", "prefetch", "--control", s.supernode.Control, bigRef)
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestCacheQuota: images that together are far larger than the quota run and are
// read at the same time, and prefetched. All bytes are right, and what the cache
// takes of the disk never exceeds the quota. Removing an image frees its bytes
// within seconds, and the others have the room.
func TestCacheQuota(t *testing.T) {
	const quota = 64 << 20
	s := newSite(t, `cache_quota = "64MiB"`)
	ctx := t.Context()
	cache := []string{filepath.Join(s.node.Root, "diffs"), filepath.Join(s.node.Root, "tmp")}
	var most atomic.Int64
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			most.Store(max(most.Load(), diskUse(t, cache...)))
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	defer func() { <-stopped }()
	defer close(stop)

	var refs []string
	var content []string
	for i := range 4 {
		one, data := noisy(t, "f", uint64(30+i), 32)
		refs, content = append(refs, s.push(t, fmt.Sprintf("app%d", i), one)), append(content, data)
	}
	var views []string
	for _, ref := range refs {
		if err := s.Pull(ctx, "shoal", ref); err != nil {
			t.Fatal(err)
		}
		if !s.isLazy(t, ctx, ref) {
			t.Errorf("%s is not lazy", ref)
		}
		views = append(views, s.mountImage(t, "shoal", ref))
	}
	var wg sync.WaitGroup
	for i, view := range views {
		wg.Go(func() { expectFile(t, filepath.Join(view, "f"), content[i]) })
	}
	wg.Wait()
	if n := most.Load(); n > quota || n < quota/2 {
		t.Errorf("the cache had %d bytes on disk, the quota is %d", n, quota)
	}
	if n := s.nodeMetric(t, "shoal_node_demand_failures_total"); n != 0 {
		t.Errorf("%v reads failed", n)
	}
	t.Logf("most on disk: %.1f MiB of 64; passed through: %.1f MiB", float64(most.Load())/(1<<20), s.nodeMetric(t, "shoal_node_not_kept_bytes_total")/(1<<20))

	// One that is not in use.
	one, _ := noisy(t, "g", 40, 8)
	gone := s.push(t, "gone", one)
	if err := s.Pull(ctx, "shoal", gone); err != nil {
		t.Fatal(err)
	}
	must(s.Ctr(ctx, "images", "rm", "--sync", gone))(t)
	if err := lab.WaitFor(ctx, "the removed image is gone", 10*time.Second, func() error {
		left, err := filepath.Glob(filepath.Join(s.node.Root, "diffs", "*"))
		if err == nil && len(left) > len(refs) {
			err = fmt.Errorf("%d diffs", len(left))
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

// TestRemoveStopsPrefetch: removing an image whose prefetch is under way ends the
// transfer and frees its bytes within seconds.
func TestRemoveStopsPrefetch(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	link := must(s.NewLink(s.supernode.HostPort(), lab.Rate(4<<20), 0))(t)
	s.node = must(s.StartNode(ctx, "node", s.supernode.Via(link), ""))(t)
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	one, _ := noisy(t, "f", 50, 64)
	ref := s.push(t, "app", one)
	if err := s.Pull(ctx, "shoal", ref); err != nil {
		t.Fatal(err)
	}
	dir := s.Path("view")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	unmount := must(s.MountImage(ctx, "shoal", ref, dir))(t)
	if err := lab.WaitFor(ctx, "prefetch under way", 20*time.Second, func() error {
		if n := link.Down(); n < 4<<20 {
			return fmt.Errorf("%d bytes", n)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := unmount(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	must(s.Ctr(ctx, "images", "rm", "--sync", ref))(t)
	if err := lab.WaitFor(ctx, "its bytes are free", 10*time.Second, func() error {
		if n := diskUse(t, filepath.Join(s.node.Root, "diffs"), filepath.Join(s.node.Root, "tmp")); n > 64<<10 {
			return fmt.Errorf("%d bytes on disk", n)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	t.Logf("free after %v", time.Since(began).Round(time.Millisecond))
	before := link.Down()
	if before > 40<<20 {
		t.Fatalf("%d bytes had come: that was no prefetch under way", before)
	}
	time.Sleep(2 * time.Second) // it is the absence of traffic that is looked for
	if n := link.Down() - before; n > 1<<20 {
		t.Errorf("%d more bytes came after the image was removed", n)
	}
}

// TestMemoryLimit: in a cgroup of 256 MiB, a node that prefetches and serves reads
// at full rate is not killed.
func TestMemoryLimit(t *testing.T) {
	const limit = 256 << 20
	base := "/sys/fs/cgroup/memory"
	if _, err := os.Stat(filepath.Join(base, "memory.limit_in_bytes")); err != nil {
		t.Skipf("needs the memory controller of cgroup v1 at %s: %v", base, err)
	}
	group := filepath.Join(base, "shoal-test-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Skipf("cannot make a memory cgroup here: %v", err)
	}
	put := func(file, value string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := lab.WaitFor(stopContext(t), "cgroup removed", 20*time.Second, func() error { return os.Remove(group) }); err != nil {
			t.Error(err)
		}
	})
	put(filepath.Join(group, "memory.limit_in_bytes"), strconv.Itoa(limit))
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	// What the test starts is born where the test is.
	self := strconv.Itoa(os.Getpid())
	put(filepath.Join(group, "cgroup.procs"), self)
	node, err := s.StartNode(ctx, "node", s.supernode.Address, "")
	put(filepath.Join(base, "cgroup.procs"), self)
	if err != nil {
		t.Fatal(err)
	}
	s.node = node
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	var layers []lab.Blob
	var content []string
	for i := range 4 {
		one, data := noisy(t, fmt.Sprintf("f%d", i), uint64(60+i), 96)
		layers, content = append(layers, one), append(content, data)
	}
	ref := s.push(t, "app", layers...)
	if err := s.Pull(ctx, "shoal", ref); err != nil {
		t.Fatal(err)
	}
	view := s.mountImage(t, "shoal", ref)
	var wg sync.WaitGroup
	for i := range content {
		wg.Go(func() { expectFile(t, filepath.Join(view, fmt.Sprintf("f%d", i)), content[i]) })
	}
	wg.Wait()
	if err := s.node.WaitLocal(ctx, ref, 2*time.Minute); err != nil {
		t.Error(err)
	}
	if err := s.node.Alive(); err != nil {
		t.Errorf("the node is gone: %v", err)
	}
	read := func(file string) string {
		return strings.TrimSpace(string(must(os.ReadFile(filepath.Join(group, file)))(t)))
	}
	oom := read("memory.oom_control")
	if strings.Contains(oom, "oom_kill ") && !strings.Contains(oom, "oom_kill 0") {
		t.Errorf("killed: %s", oom)
	}
	_, peak, err := s.node.RSS()
	if err != nil {
		t.Fatal(err)
	}
	log := string(must(os.ReadFile(s.node.Log))(t))
	if !strings.Contains(log, "memory is limited by the cgroup") {
		t.Error("the node has not found the limit of its cgroup")
	}
	t.Logf("peak RSS %d MiB; the cgroup had %s bytes at most, of %d; limit hit %s times", peak>>20, read("memory.max_usage_in_bytes"), limit, read("memory.failcnt"))
}
