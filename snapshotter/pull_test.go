package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
)

// Concurrent Prepares of one image wait for one round trip, and a caller that goes
// away does not end it: neither for the others, nor for the next pull.
func TestSingleFlight(t *testing.T) { synctest.Test(t, testSingleFlight) }

func testSingleFlight(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	n.images.gate = make(chan struct{})
	var wg sync.WaitGroup
	results := make([]error, 4)
	ctx, cancel := context.WithCancel(bg)
	for i := range results {
		wg.Go(func() {
			c := bg
			if i == 0 {
				c = ctx
			}
			_, results[i] = n.Prepare(c, fmt.Sprintf("ns/%d/k", i), "", snapshots.WithLabels(img.labels(0)))
		})
	}
	synctest.Wait() // all four are in
	cancel()
	synctest.Wait()
	close(n.images.gate)
	wg.Wait()
	if !errors.Is(results[0], context.Canceled) {
		t.Errorf("caller that went away: %v", results[0])
	}
	for i, err := range results[1:] {
		if !errdefs.IsAlreadyExists(err) {
			t.Errorf("caller %d: %v", i+1, err)
		}
	}
	if n.images.asked() != 1 {
		t.Errorf("asked %d times", n.images.asked())
	}
	count := 0
	check(t, n.Walk(bg, func(context.Context, snapshots.Info) error { count++; return nil }))
	if count != 1 {
		t.Errorf("%d snapshots for one chain", count)
	}

	gate := make(chan struct{})
	n.images.gate = gate
	ctx, cancel = context.WithCancel(bg)
	cancel()
	img2 := newImage("registry.test/y:1", threeLayers(t)...)
	n.images.publish(img2)
	if _, err := n.Prepare(ctx, "ns/8/k", "", snapshots.WithLabels(img2.labels(0))); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled Prepare: %v", err)
	}
	close(gate)
	if _, fetched, err := n.pull(bg, img2); err != nil || len(fetched) > 0 || n.images.asked() != 2 {
		t.Errorf("the next pull fetched %v, asked %d times: %v", fetched, n.images.asked(), err)
	}
}

// A Prepare does not wait for longer than PrepareTimeout; the pull is not lazy then,
// all of it, and the next one is, without asking again.
func TestPrepareTimeout(t *testing.T) { synctest.Test(t, testPrepareTimeout) }

func testPrepareTimeout(t *testing.T) {
	n := newNode(t, func(c *nodeConfig) { c.PrepareTimeout = 30 * time.Millisecond })
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	gate := make(chan struct{})
	n.images.gate = gate
	opts := snapshots.WithLabels(img.labels(0))
	must(n.Prepare(bg, "ns/1/a", "", opts))(t)
	close(gate)
	synctest.Wait() // it is open
	check(t, n.Commit(bg, "ns/1/"+img.chain(0), "ns/1/a", opts))
	if _, err := n.Prepare(bg, "ns/1/b", "ns/1/"+img.chain(0), snapshots.WithLabels(img.labels(1))); err != nil {
		t.Errorf("second layer of a pull that is not lazy: %v", err)
	}
	if len(n.log.lines("not lazy", "prepare_timeout")) != 1 {
		t.Errorf("log:\n%s", n.log.b.String())
	}
	check(t, n.Remove(bg, "ns/1/b"))
	check(t, n.Remove(bg, "ns/1/"+img.chain(0)))
	if _, fetched, err := n.pull(bg, img); err != nil || len(fetched) > 0 || n.images.asked() != 1 {
		t.Errorf("the next pull fetched %v, asked %d times: %v", fetched, n.images.asked(), err)
	}
}

func TestIndexTimeout(t *testing.T) {
	n := newNode(t, func(c *nodeConfig) { c.IndexTimeout = 10 * time.Millisecond })
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	n.images.gate = make(chan struct{})
	_, fetched, err := n.pull(bg, img)
	check(t, err)
	if len(fetched) != 3 || n.images.asked() != 1 {
		t.Errorf("fetched %v, asked %d times", fetched, n.images.asked())
	}
	if len(n.log.lines("not lazy", "within 10ms")) != 1 {
		t.Errorf("log:\n%s", n.log.b.String())
	}
}

// A pull that ends in the middle: what its later layers had opened goes.
func TestAbandonedPull(t *testing.T) {
	n := newNode(t, func(c *nodeConfig) { c.PullIdle = 50 * time.Millisecond })
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	gone := make(chan blockdev.Digest, 3)
	n.data.onRemove = func(id blockdev.Digest) { gone <- id }
	_, err := n.Prepare(bg, "ns/1/a", "", snapshots.WithLabels(img.labels(0)))
	if !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	for range 2 {
		if id := <-gone; id == img.layers[0].diffID {
			t.Error("removed the diff of a snapshot")
		}
	}
}

// Prepares that carry labels which only the snapshotter may set.
func TestHostileLabels(t *testing.T) {
	n := newNode(t)
	secret := newImage("registry.test/secret:1", newLayer(t, file("secret")))
	n.images.publish(secret)
	_, _, err := n.pull(bg, secret)
	check(t, err)
	evil := map[string]string{labelDiff: secret.layers[0].diffID.String(), labelFixup: "true"}
	must(n.Prepare(bg, "k", "", snapshots.WithLabels(evil)))(t)
	check(t, n.Commit(bg, "mine", "k", snapshots.WithLabels(evil)))
	must(n.Update(bg, snapshots.Info{Name: "mine", Labels: evil}))(t)
	must(n.Update(bg, snapshots.Info{Name: "mine", Labels: evil}, "labels"))(t)
	must(n.Update(bg, snapshots.Info{Name: "mine", Labels: evil}, "labels."+labelDiff))(t)
	root := mounted(t, must(n.View(bg, "v", "mine"))(t))
	if entries := must(os.ReadDir(root))(t); len(entries) != 0 {
		t.Fatalf("labels opened somebody else's diff: %v", entries)
	}
	// Nor can they be taken away.
	name := secret.chain(0)
	must(n.Update(bg, snapshots.Info{Name: name, Labels: map[string]string{"a": "b"}}))(t)
	must(n.Update(bg, snapshots.Info{Name: name}, "labels."+labelDiff))(t)
	info := must(n.Stat(bg, name))(t)
	if info.Labels[labelDiff] != evil[labelDiff] || info.Labels[labelRef] != name || info.Labels["a"] != "b" {
		t.Errorf("labels are %v", info.Labels)
	}
}

// LabelPrefetch is a wish: neither its value nor a prefetch that fails or hangs
// keeps an image from being pulled.
func TestPrefetchWait(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	_, fetched, err := n.pull(bg, img, LabelPrefetch+"=wait")
	check(t, err)
	if len(fetched) != 0 || len(n.data.waited) != 3 {
		t.Errorf("fetched %v, waited for %v", fetched, n.data.waited)
	}
	n.data.waitErr = fmt.Errorf("cut: %w", blockdev.ErrUnavailable)
	for i, value := range []string{"wait", "perhaps"} {
		other := newImage(fmt.Sprintf("registry.test/y:%d", i), newLayer(t, file(value)))
		n.images.publish(other)
		if _, fetched, err := n.pull(bg, other, LabelPrefetch+"="+value); err != nil || len(fetched) != 0 {
			t.Errorf("value %q: fetched %v: %v", value, fetched, err)
		}
	}
	if len(n.log.lines("does not wait", "cut")) != 1 || len(n.log.lines("ignored", "perhaps")) != 1 {
		t.Errorf("log:\n%s", n.log.b.String())
	}
}

// Layers that containerd unpacks in parallel come without parents. They work, in
// the ordinary way.
func TestParallelUnpack(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	for i := 1; i < 3; i++ {
		mounts := must(n.Prepare(bg, fmt.Sprintf("ns/%d/k", i), "", snapshots.WithLabels(img.labels(i))))(t)
		if mounts[0].Type != "bind" {
			t.Errorf("mounts %v", mounts)
		}
	}
	if len(n.log.lines("not lazy", "in parallel", img.ref)) != 1 {
		t.Errorf("log:\n%s", n.log.b.String())
	}
}

// One node serves several namespaces: the same chain on the same parent is one
// snapshot, on another parent it is another one.
func TestNamespaces(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	// Namespace "other" has the lowest layer unpacked.
	opt := snapshots.WithLabels(map[string]string{labelRef: img.chain(0)})
	mounts := must(n.Prepare(bg, "other/1/k", "", opt))(t)
	check(t, applyTar(bg, mounts, img.layers[0].tar))
	ordinary := "other/1/" + img.chain(0)
	check(t, n.Commit(bg, ordinary, "other/1/k", opt))

	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	checkThree(t, mounted(t, must(n.View(bg, "ns/1/v", top))(t)))

	parent := ordinary
	for i := 1; i < 3; i++ {
		_, err := n.Prepare(bg, fmt.Sprintf("other/%d/k", i), parent, snapshots.WithLabels(img.labels(i)))
		if !errdefs.IsAlreadyExists(err) {
			t.Fatalf("layer %d: %v", i, err)
		}
		next := ""
		check(t, n.Walk(bg, func(_ context.Context, info snapshots.Info) error {
			next = info.Name
			return nil
		}, fmt.Sprintf(`labels."containerd.io/snapshot.ref"==%s,parent==%q`, img.chain(i), parent)))
		if next == "" {
			t.Fatalf("layer %d has no snapshot on %s", i, parent)
		}
		parent = next
	}
	checkThree(t, mounted(t, must(n.View(bg, "other/9/v", parent))(t)))
	// A third namespace shares what is there.
	if _, err := n.Prepare(bg, "third/1/k", "", snapshots.WithLabels(img.labels(0))); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
}

func TestKeep(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	kept := must(n.Keep(bg, img.ref, blockdev.Digest{}))(t)
	if len(kept.Layers) != 3 || kept.Manifest != img.manifest || !kept.Kept {
		t.Errorf("%+v", kept)
	}
	check(t, n.Cleanup(bg))
	n.crash()
	check(t, n.Cleanup(bg))
	for _, l := range img.layers {
		if !n.data.has(l) {
			t.Fatal("a kept diff was removed")
		}
	}
	if list := must(n.Images(bg))(t); len(list) != 1 || !list[0].Kept {
		t.Errorf("Images: %+v", list)
	}
	_, fetched, err := n.pull(bg, img)
	check(t, err)
	if len(fetched) != 0 {
		t.Errorf("fetched %v", fetched)
	}
	if have := n.images.requests[1].Have; len(have) != 3 {
		t.Errorf("Have is %v, all indexes are here", have)
	}
	if list := must(n.Images(bg))(t); len(list) != 1 || list[0].Kept {
		t.Errorf("Images: %+v", list)
	}
	for i := 2; i >= 0; i-- {
		check(t, n.Remove(bg, img.chain(i)))
	}
	check(t, n.Cleanup(bg))
	if len(n.data.dirs) != 0 {
		t.Error("diffs stay kept after their image was used and removed")
	}

	must(n.Keep(bg, img.ref, img.manifest))(t)
	if !n.Evict(bg) || len(n.data.dirs) != 0 {
		t.Error("evicted diffs stay")
	}
}

// What makes room is what nobody uses, then kept images, oldest first; never what
// is pulled, or pinned.
func TestEvict(t *testing.T) {
	n := newNode(t)
	var imgs []testImage
	for _, name := range []string{"pulled", "old", "pinned", "young"} {
		img := newImage("registry.test/"+name+":1", newLayer(t, file(name)))
		n.images.publish(img)
		imgs = append(imgs, img)
	}
	_, _, err := n.pull(bg, imgs[0])
	check(t, err)
	must(n.Keep(bg, imgs[1].ref, blockdev.Digest{}))(t)
	pinned := must(n.Keep(bg, imgs[2].ref, blockdev.Digest{}))(t)
	must(n.Keep(bg, imgs[3].ref, blockdev.Digest{}))(t)
	release := must(n.Pin(bg, pinned))(t)
	left := func(want ...int) {
		t.Helper()
		for i, img := range imgs {
			if has := n.data.has(img.layers[0]); has != slices.Contains(want, i) {
				t.Errorf("%s: on the node: %v", img.ref, has)
			}
		}
	}
	if !n.Evict(bg) {
		t.Error("nothing evicted of three kept images")
	}
	left(0, 2, 3)
	if !n.Evict(bg) {
		t.Error("nothing evicted of two kept images, one pinned")
	}
	left(0, 2)
	if n.Evict(bg) {
		t.Error("a pinned image was evicted")
	}
	left(0, 2)
	release()
	if !n.Evict(bg) || n.Evict(bg) {
		t.Error("want the image that was pinned evicted, and then nothing")
	}
	left(0)
	// A snapshot that containerd has removed and not cleaned up after.
	check(t, n.Remove(bg, imgs[0].chain(0)))
	if !n.Evict(bg) {
		t.Error("a diff without use was not removed")
	}
	left()
}

// Diffs that no record names are removed at start.
func TestOrphans(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	_, _, err := n.pull(bg, img)
	check(t, err)
	orphan := newLayer(t, file("orphan"))
	must(n.data.AddChecked(bg, orphan.index, func(*blockdev.Index) error { return nil }))(t)
	n.crash()
	waitFor(t, "a diff that nothing names is removed", func() bool { return !n.data.has(orphan) })
	for _, l := range img.layers {
		if !n.data.has(l) {
			t.Error("a diff in use was removed")
		}
	}
}

// A kept image shares a layer with one that comes and goes, and is then pulled
// while that layer's snapshot is there.
func TestKeepShared(t *testing.T) {
	n := newNode(t)
	ls := threeLayers(t)
	a, b := newImage("registry.test/a:1", ls[0]), newImage("registry.test/b:1", ls...)
	n.images.publish(a, b)
	_, _, err := n.pull(bg, a)
	check(t, err)
	must(n.Keep(bg, b.ref, b.manifest))(t)
	check(t, n.Remove(bg, a.chain(0)))
	check(t, n.Cleanup(bg))
	for _, l := range ls {
		if !n.data.has(l) {
			t.Fatal("a kept diff went with another image")
		}
	}
	_, _, err = n.pull(bg, a)
	check(t, err)
	_, _, err = n.pull(bg, b)
	check(t, err)
	// Keeping what is there as a whole keeps nothing.
	if img := must(n.Keep(bg, b.ref, b.manifest))(t); img.Kept {
		t.Error("an image with snapshots is kept")
	}
	for i := 2; i >= 0; i-- {
		check(t, n.Remove(bg, b.chain(i)))
	}
	check(t, n.Cleanup(bg))
	if len(n.data.dirs) != 0 {
		t.Errorf("diffs left: %v", n.data.dirs)
	}
}

// Close ends a pull that waits.
func TestCloseWhileWaiting(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.gate = make(chan struct{})
	done := make(chan error, 1)
	go func() {
		_, err := n.Prepare(bg, "ns/1/k", "", snapshots.WithLabels(img.labels(0)))
		done <- err
	}()
	for n.images.asked() == 0 {
		time.Sleep(time.Millisecond)
	}
	check(t, n.Close())
	if err := <-done; !errdefs.IsUnavailable(err) {
		t.Errorf("waiting Prepare: %v", err)
	}
}
