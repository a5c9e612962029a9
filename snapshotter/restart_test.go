package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// After a kill everything is as it was, and what was half done is gone.
func TestCrash(t *testing.T) {
	n := newNode(t)
	used := newImage("registry.test/used:1", threeLayers(t)...)
	half := newImage("registry.test/half:1", newLayer(t, file("h1")), newLayer(t, file("h2")))
	n.images.publish(used, half)
	top, _, err := n.pull(bg, used)
	check(t, err)
	must(n.Prepare(bg, "ns/7/c", top))(t)
	// A pull that has only its first layer.
	if _, err := n.Prepare(bg, "ns/8/k", "", snapshots.WithLabels(half.labels(0))); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	// Directories whose transaction was never committed, and work in scratch.
	for _, d := range []string{"s/999/fs", "l/999", "scratch/fixup-1/fs/a", "scratch/gone-1/i/0", "tmp/other", "m/other"} {
		check(t, os.MkdirAll(filepath.Join(n.root, d), 0o700))
	}
	// A diff that was going to be added, and never was.
	lost := blockdev.Sum([]byte("lost"))
	n.crashed = func() {
		db := must(bolt.Open(filepath.Join(n.root, images.File), 0o600, nil))(t)
		check(t, db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("diffs")).Put(lost[:], []byte("{}")) }))
		check(t, db.Close())
	}
	n.data.forgetPrefetched()

	n.crash()
	waitFor(t, "what nothing uses is removed", func() bool {
		left := must(os.ReadDir(n.scratch()))(t)
		return !n.data.has(half.layers[1]) && len(n.recorded()) == 4 && len(left) == 0
	})
	if !n.data.has(half.layers[0]) {
		t.Error("a diff of a pull under way is gone")
	}
	for _, l := range used.layers {
		if !n.data.has(l) {
			t.Error("a diff in use is gone")
		}
	}
	for _, d := range []string{"s/999", "l/999", "scratch/fixup-1", "scratch/gone-1"} {
		if _, err := os.Lstat(filepath.Join(n.root, d)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", d, err)
		}
	}
	for _, d := range []string{"tmp/other", "m/other"} {
		if _, err := os.Lstat(filepath.Join(n.root, d)); err != nil {
			t.Errorf("what is not the snapshotter's: %v", err)
		}
	}
	if got := n.data.forgetPrefetched(); got != 0 {
		t.Errorf("%d diffs are prefetched, and the container does not run", got)
	}
	checkThree(t, mounted(t, must(n.Mounts(bg, "ns/7/c"))(t)))
	if got := len(n.data.prefetched); got != 3 {
		t.Errorf("%d diffs are prefetched, want the 3 of the container", got)
	}
	// The pull goes on.
	_, fetched, err := n.pull(bg, half)
	check(t, err)
	if len(fetched) != 0 {
		t.Errorf("fetched %v", fetched)
	}
	check(t, n.Remove(bg, "ns/7/c"))
	for i := 2; i >= 0; i-- {
		check(t, n.Remove(bg, used.chain(i)))
	}
	check(t, n.Cleanup(bg))
	for _, l := range used.layers {
		if n.data.has(l) {
			t.Error("a diff without use is there")
		}
	}
}

// One image that cannot be mounted does not keep the others from being mounted,
// nor the snapshotter from starting, and is tried again on demand.
func TestMountFailsAtStart(t *testing.T) {
	n := newNode(t)
	for i := range 3 {
		img := newImage(fmt.Sprintf("registry.test/i%d:1", i), newLayer(t, file(fmt.Sprintf("f%d", i))))
		n.images.publish(img)
		top, _, err := n.pull(bg, img)
		check(t, err)
		must(n.Prepare(bg, fmt.Sprintf("c%d", i), top))(t)
		if i == 1 {
			n.data.mountErr[img.layers[0].diffID] = fmt.Errorf("no loop device: %w", blockdev.ErrUnavailable)
		}
	}
	n.crash()
	waitFor(t, "the log says what cannot be mounted", func() bool { return len(n.log.lines("cannot mount the layers", "snapshot=c1", "no loop device")) == 1 })
	if _, err := n.Mounts(bg, "c1"); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no loop device") {
		t.Errorf("Mounts: %v", err)
	}
	must(n.Mounts(bg, "c0"))(t)
	must(n.Mounts(bg, "c2"))(t)
	n.data.set(func() { clear(n.data.mountErr) })
	must(n.Mounts(bg, "c1"))(t)
}

// Diffs that the data path has lost are fetched again when they are needed.
func TestLostDiffs(t *testing.T) { synctest.Test(t, testLostDiffs) }

func testLostDiffs(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	for _, l := range img.layers {
		check(t, n.data.Remove(bg, l.diffID))
	}
	n.images.set(func() { n.images.err = blockdev.ErrUnavailable })
	if _, err := n.Prepare(bg, "c", top); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), img.ref) {
		t.Errorf("with the supernode gone: %v", err)
	}
	synctest.Wait() // the other layers' attempts are over
	if _, err := n.Stat(bg, "c"); !errdefs.IsNotFound(err) {
		t.Errorf("snapshot was made: %v", err)
	}
	n.images.set(func() { n.images.err = nil })
	asked := n.images.asked()
	checkThree(t, mounted(t, must(n.Prepare(bg, "c", top))(t)))
	if n.images.asked() != asked+1 {
		t.Errorf("asked %d times for one image", n.images.asked()-asked)
	}
}

// A second process on the same directory is refused.
func TestTwoProcesses(t *testing.T) {
	n := newNode(t)
	if _, err := images.Open(images.Config{Root: n.root, Data: n.data}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("second Open: %v", err)
	}
}

func TestConfig(t *testing.T) {
	data := &fakeData{}
	for want, cfg := range map[string]images.Config{
		"Root": {Root: "relative", Data: data},
		"Data": {Root: "/x"},
		"must": {Root: "/x", Data: data, IndexTimeout: -1},
	} {
		if _, err := images.Open(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
	for want, cfg := range map[string]Config{
		"Root":   {Root: "relative", Images: &images.Catalogue{}},
		"Images": {Root: "/x"},
		"must":   {Root: "/x", Images: &images.Catalogue{}, PrepareTimeout: -1},
	} {
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}
