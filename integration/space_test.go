package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
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
	noError(t, os.MkdirAll(dir, 0o700))
	noError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", megabytes)))
	t.Cleanup(func() {
		// The lab's processes have the mounts below it; they end after the test.
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// fillDisk writes a file to the disk that dir is on until nothing more fits. free
// deletes it.
func fillDisk(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "of-somebody-else")
	f := must(os.Create(path))(t)
	defer f.Close()
	for block := make([]byte, 64<<10); len(block) >= 4<<10; {
		if _, err := f.Write(block); errors.Is(err, unix.ENOSPC) {
			block = block[:len(block)/2]
		} else {
			noError(t, err)
		}
	}
	return func() { noError(t, os.Remove(path)) }
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

// TestDrillNodeDiskFull fills the node's disk while an image is being fetched. Its
// containers read right bytes all the same, the log says so once, and when there
// is room again the rest of the image comes by itself.
func TestDrillNodeDiskFull(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	d := &tally{drill: "disk full on the node, then freed", rounds: min(rounds(t, 2), 10)}
	disk := s.Path("node")
	smallDisk(t, disk, 192)
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	link := must(s.NewLink(s.supernode.HostPort(), lab.Rate(24<<20), 0))(t)
	s.node = must(s.StartNode(ctx, "node", s.supernode.Via(link), ""))(t)
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	passed, stuck := 0.0, 0
	for i := range d.rounds {
		one, a := noisy(t, "a", uint64(1100+i), 40)
		ref := s.push(t, fmt.Sprint("app", i), one)
		noError(t, s.Pull(ctx, "shoal", ref))
		view := s.Path(fmt.Sprint("full", i))
		noError(t, os.Mkdir(view, 0o700))
		unmount := must(s.MountImage(ctx, "shoal", ref, view))(t)
		wait(ctx, rand.N(time.Second))
		free := fillDisk(t, disk)
		d.file(filepath.Join(view, "a"), a)
		free()
		if err := s.node.WaitLocal(ctx, ref, time.Minute); err != nil {
			t.Log(err)
			stuck++
		}
		noError(t, unmount())
		view = s.Path(fmt.Sprint("freed", i))
		noError(t, os.Mkdir(view, 0o700))
		unmount = must(s.MountImage(ctx, "shoal", ref, view))(t)
		d.file(filepath.Join(view, "a"), a)
		noError(t, unmount())
		must(s.Ctr(ctx, "images", "rm", "--sync", ref))(t)
		if now := s.nodeMetric(t, "shoal_node_not_kept_bytes_total"); now > passed {
			passed = now
		} else {
			t.Errorf("round %d: no bytes passed through: that was no full disk", i)
		}
	}
	d.rows(t)
	count(t, d.drill+": did not go on by itself", stuck)
	log := string(must(os.ReadFile(s.node.Log))(t))
	if n := strings.Count(log, "the cache is full"); n != d.rounds {
		t.Errorf("the log says %d times that the cache is full, in %d rounds", n, d.rounds)
	}
}

// TestDrillSupernodeDiskFull fills the supernode's disk. What does not fit is not
// lazy, and the node is told why; what is stored goes on; with room, all goes on
// by itself.
func TestDrillSupernodeDiskFull(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	d := &tally{drill: "disk full on the supernode, then freed", rounds: min(rounds(t, 2), 6)}
	disk := s.Path("super")
	smallDisk(t, disk, 256)
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	s.node = must(s.StartNode(ctx, "node", s.supernode.Address, ""))(t)
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	stuck := 0
	for i := range d.rounds {
		small, a := noisy(t, "a", uint64(2100+i), 2)
		big, b := noisy(t, "b", uint64(3100+i), 30)
		smallRef, bigRef := s.push(t, fmt.Sprint("small", i), small), s.push(t, fmt.Sprint("big", i), big)
		noError(t, s.Pull(ctx, "shoal", smallRef))
		free := fillDisk(t, disk)
		noError(t, s.Pull(ctx, "shoal", bigRef)) // in the ordinary way
		if s.isLazy(t, ctx, bigRef) {
			t.Error("an image that does not fit is lazy")
		}
		if line := logLine(t, s.node.Log, bigRef); !strings.Contains(line, "no space left") {
			t.Errorf("the node does not say why: %s", line)
		}
		d.file(filepath.Join(s.mountImage(t, "shoal", bigRef), "b"), b)
		d.file(filepath.Join(s.mountImage(t, "shoal", smallRef), "a"), a)
		free()
		if err := lab.WaitFor(ctx, "the image stored once there is room", time.Minute, func() error {
			_, err := s.Run(ctx, "shoal", "prefetch", "--control", s.supernode.Control, bigRef)
			return err
		}); err != nil {
			t.Log(err)
			stuck++
		}
	}
	d.rows(t)
	count(t, d.drill+": did not go on by itself", stuck)
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
