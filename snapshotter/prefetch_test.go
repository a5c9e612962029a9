package snapshotter

import (
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

// waitFor waits for what a node does in the background.
func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 1000 {
		if done() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("%s: it has not happened", what)
}

// looked is a time in which the catalogue has looked at what is mounted.
const looked = 5 * time.Second

// TestPrefetchEnds: prefetch of an image begins with a container, ends with the last
// one, though its snapshot stays, and begins again with the next. The path has
// characters in it that the kernel writes otherwise.
func TestPrefetchEnds(t *testing.T) { synctest.Test(t, testPrefetchEnds) }

func testPrefetchEnds(t *testing.T) {
	n := newNode(t, func(c *nodeConfig) { c.Root = filepath.Join(filepath.Dir(c.Root), "a=b c") })
	img := newImage("registry.test/job:1", threeLayers(t)...)
	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	mounts := must(n.Prepare(bg, "ns/9/job", top))(t)
	count := func(list *[]blockdev.Digest) (got int) {
		n.data.set(func() { got = len(*list) })
		return got
	}
	if got := count(&n.data.prefetched); got != 3 {
		t.Fatalf("%d diffs are fetched for a container, want 3", got)
	}
	dir := t.TempDir()
	check(t, mount.All(mounts, dir))
	time.Sleep(looked) // the container is seen
	if got := count(&n.data.stopped); got != 0 {
		t.Errorf("prefetch of %d diffs has ended while the container runs", got)
	}
	check(t, unix.Unmount(dir, 0))
	waitFor(t, "prefetch ends", func() bool { return count(&n.data.stopped) == 3 })
	must(n.Mounts(bg, "ns/9/job"))(t)
	if got := count(&n.data.prefetched); got != 6 {
		t.Errorf("%d diffs were fetched after the next start, want 3 more", got)
	}
	check(t, n.Remove(bg, "ns/9/job"))
	waitFor(t, "prefetch ends", func() bool { return count(&n.data.stopped) == 6 })
}

// TestModes: what is fetched of an image by its mode, when it is pulled and when a
// container starts.
func TestModes(t *testing.T) {
	n := newNode(t, withRules(t, policy.Rules{Prefetch: map[string]policy.Mode{
		"registry.test/startup": policy.Startup, "registry.test/none": policy.None,
	}}))
	n.images.change = func(img *image.Image) {
		img.Layers[0].Profile = blockdev.Profile{{Chunk: 0, Rank: 0}}
	}
	for name, want := range map[string]struct{ startup, all int }{"all": {1, 1}, "startup": {1, 0}, "none": {0, 0}} {
		img := newImage("registry.test/"+name+":1", newLayer(t, file(name)))
		n.images.publish(img)
		n.data.set(func() { n.data.startup, n.data.prefetched = nil, nil })
		top, _, err := n.pull(bg, img)
		check(t, err)
		must(n.Prepare(bg, "ns/9/"+name, top))(t)
		n.data.set(func() {
			if len(n.data.startup) != want.startup || len(n.data.prefetched) != want.all {
				t.Errorf("%s: %d startup profiles and %d diffs were fetched, want %d and %d",
					name, len(n.data.startup), len(n.data.prefetched), want.startup, want.all)
			}
		})
	}
}

// followPatience is longer than a container may take to follow its pull.
const followPatience = 15 * time.Second

// TestAfterPull: an image that no container has followed is fetched, also after a
// restart, and one that a container has followed is not.
func TestAfterPull(t *testing.T) { synctest.Test(t, testAfterPull) }

func testAfterPull(t *testing.T) {
	after := func(c *nodeConfig) { c.PrefetchAfterPull = true }
	n := newNode(t, after)
	img := newImage("registry.test/app:1", threeLayers(t)...)
	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	fetched := func(want int, when string) {
		t.Helper()
		time.Sleep(followPatience)
		n.data.set(func() {
			if got := len(n.data.prefetched); got != want {
				t.Errorf("%s: %d diffs are fetched, want %d", when, got, want)
			}
			n.data.prefetched = nil
		})
	}
	n.data.set(func() {
		if len(n.data.prefetched) != 0 {
			t.Error("the pull's container has no time to start")
		}
	})
	fetched(3, "after a pull")
	n.crash(after)
	fetched(3, "after a restart")
	must(n.View(bg, "v", top, snapshots.WithLabels(map[string]string{"a": "b"})))(t)
	fetched(3, "for a container")
	check(t, n.Remove(bg, "v"))
	fetched(0, "its container is gone")
	n.crash(after)
	fetched(0, "followed before a restart")
	other := newNode(t) // the config does not want it
	other.images.publish(img)
	_, _, err = other.pull(bg, img)
	check(t, err)
	n = other
	fetched(0, "against the config")

	// A pull whose container comes and goes at once.
	n = newNode(t, after)
	n.images.publish(img)
	top, _, err = n.pull(bg, img)
	check(t, err)
	must(n.View(bg, "v", top))(t)
	check(t, n.Remove(bg, "v"))
	fetched(3, "for the container alone")
}
