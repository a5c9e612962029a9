package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"archive/tar"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// three layers: the upper ones change, hide and add.
func threeLayers(t testing.TB) []layer {
	return []layer{
		newLayer(t, dir("bin", 0o755), file("bin/sh"), dir("etc", 0o755), file("etc/conf"), file("etc/old")),
		newLayer(t, dir("etc", 0o750), file("etc/.wh.old"), file("etc/new")),
		newLayer(t, dir("app", 0o700), file("app/main")),
	}
}

func checkThree(t testing.TB, root string) {
	t.Helper()
	for _, name := range []string{"bin/sh", "etc/conf", "etc/new", "app/main"} {
		if got := read(t, root, name); got != name {
			t.Errorf("%s reads %q", name, got)
		}
	}
	if _, err := os.Lstat(filepath.Join(root, "etc/old")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("etc/old: %v, a layer deletes it", err)
	}
	if fi, err := os.Stat(filepath.Join(root, "etc")); err != nil || fi.Mode().Perm() != 0o750 {
		t.Errorf("etc: %v, %v", fi, err)
	}
}

// supernodeSays is an error that a supernode has answered with.
type supernodeSays string

func (e supernodeSays) Error() string  { return string(e) }
func (e supernodeSays) Answered() bool { return true }
func (e supernodeSays) Unwrap() error  { return blockdev.ErrUnavailable }

func TestLazyImage(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/app:1", threeLayers(t)...)
	n.images.publish(img)
	top, fetched, err := n.pull(bg, img)
	check(t, err)
	if len(fetched) != 0 {
		t.Fatalf("layers %v were fetched; log:\n%s", fetched, n.log.b.String())
	}
	if n.images.asked() != 1 {
		t.Errorf("%d round trips for one image", n.images.asked())
	}
	if top != img.chain(2) {
		t.Errorf("top snapshot is %q, want the ref's name %q", top, img.chain(2))
	}
	if len(n.log.lines("image is lazy", img.ref)) != 1 {
		t.Errorf("log:\n%s", n.log.b.String())
	}

	mounts := must(n.Prepare(bg, "ns/9/container", top))(t)
	root := mounted(t, mounts)
	checkThree(t, root)
	check(t, os.WriteFile(filepath.Join(root, "etc/conf"), []byte("changed"), 0o600))
	if got := read(t, mounted(t, must(n.View(bg, "ns/10/view", top))(t)), "etc/conf"); got != "etc/conf" {
		t.Errorf("a container's write reached the image: %q", got)
	}
	again := must(n.Mounts(bg, "ns/9/container"))(t)
	if fmt.Sprint(mounts) != fmt.Sprint(again) {
		t.Errorf("Mounts: %v, Prepare answered %v", again, mounts)
	}
	want := []blockdev.Digest{img.layers[2].diffID, img.layers[1].diffID, img.layers[0].diffID}
	if got := n.data.prefetched; len(got) < 3 || !slices.Equal(got[:3], want) {
		t.Errorf("prefetched %v, want %v first", got, want)
	}
	usage := must(n.Usage(bg, top))(t)
	if usage.Size != 4711 || usage.Inodes != 7 {
		t.Errorf("usage of a lazy snapshot is %+v, the data path says 4711 bytes, 7 inodes", usage)
	}
	list := must(n.Images(bg))(t)
	if len(list) != 1 || list[0].Ref != img.ref || len(list[0].Layers) != 3 || list[0].Layers[1].DiffID != img.layers[1].diffID || list[0].Kept {
		t.Errorf("Images: %+v", list)
	}
}

// A view of one lazy layer is a read-only bind mount.
func TestLazySingleLayer(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/one:1", newLayer(t, file("hello")))
	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	mounts := must(n.View(bg, "v", top))(t)
	if len(mounts) != 1 || mounts[0].Type != "bind" || !slices.Contains(mounts[0].Options, "ro") {
		t.Errorf("mounts %v", mounts)
	}
	root := mounted(t, mounts)
	if read(t, root, "hello") != "hello" {
		t.Error("wrong content")
	}
	if err := os.WriteFile(filepath.Join(root, "x"), nil, 0o600); err == nil {
		t.Error("a view can be written to")
	}
	root = mounted(t, must(n.Prepare(bg, "c", top))(t))
	check(t, os.WriteFile(filepath.Join(root, "x"), nil, 0o600))
}

// Whatever is wrong with an image, containerd unpacks all of it, one line says
// why, and nothing stays behind.
func TestFallback(t *testing.T) {
	bad := errors.New("boom")
	for _, c := range []struct {
		name  string
		set   func(*node, testImage)
		cause string
		want  func(map[string]string) // changes the labels
	}{
		{"unavailable", func(n *node, _ testImage) { n.images.err = blockdev.ErrUnavailable }, "no supernode answers", nil},
		{"registry unavailable", func(n *node, _ testImage) {
			n.images.err = fmt.Errorf("supernode: %w", supernodeSays("registry r.example: HTTP 503"))
		}, "it is not available now: image registry.test/bad:1: supernode: registry r.example: HTTP 503", nil},
		{"unauthorized", func(n *node, _ testImage) { n.images.err = blockdev.ErrUnauthorized }, "credential", nil},
		{"unsupported", func(n *node, _ testImage) { n.images.err = blockdev.ErrUnsupported }, "cannot be served lazily", nil},
		{"add", func(n *node, _ testImage) { n.data.addErr = blockdev.ErrNoSpace }, "no space left", nil},
		{"mount", func(n *node, i testImage) { n.data.mountErr[i.layers[1].diffID] = bad }, "boom", nil},
		{"no layers", func(n *node, _ testImage) {
			n.images.change = func(i *image.Image) { i.Layers = nil }
		}, "0 layers", nil},
		{"other diff", func(n *node, _ testImage) {
			n.images.change = func(i *image.Image) { i.Layers[2].DiffID[0]++ }
		}, "index of diff", nil},
		{"other chain", func(n *node, _ testImage) {
			n.images.change = func(i *image.Image) {
				i.Layers[0].DiffID, i.Layers[1].DiffID = i.Layers[1].DiffID, i.Layers[0].DiffID
				i.Layers[0].Index, i.Layers[1].Index = i.Layers[1].Index, i.Layers[0].Index
			}
		}, "image config", nil},
		{"missing index", func(n *node, _ testImage) {
			n.images.change = func(i *image.Image) { i.Layers[2].Index = nil }
		}, "without an index", nil},
		{"garbage", func(n *node, _ testImage) {
			n.images.change = func(i *image.Image) { i.Layers[2].Index = []byte("garbage") }
		}, "decode index", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			img := newImage("registry.test/bad:1", threeLayers(t)...)
			n.images.publish(img)
			c.set(n, img)
			top, fetched, err := n.pull(bg, img)
			check(t, err)
			if !slices.Equal(fetched, []int{0, 1, 2}) {
				t.Errorf("fetched %v", fetched)
			}
			if n.images.asked() != 1 {
				t.Errorf("asked %d times for one pull", n.images.asked())
			}
			if lines := n.log.lines("not lazy"); len(lines) != 1 || !strings.Contains(lines[0], c.cause) || !strings.Contains(lines[0], img.ref) {
				t.Errorf("want one line with %q and the image, got:\n%s", c.cause, n.log.b.String())
			}
			checkThree(t, mounted(t, must(n.View(bg, "v", top))(t)))
			check(t, n.Cleanup(bg))
			if len(n.data.dirs) != 0 {
				t.Errorf("diffs left behind: %v", n.data.dirs)
			}
			if d := n.recorded(); len(d) != 0 {
				t.Errorf("records left behind: %v", d)
			}
		})
	}
}

// Layers of which containerd does not say whose they are.
func TestUnlabelled(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	parent := ""
	for i := range img.layers {
		opt := snapshots.WithLabels(map[string]string{labelRef: img.chain(i)})
		mounts := must(n.Prepare(bg, "k", parent, opt))(t)
		check(t, applyTar(bg, mounts, img.layers[i].tar))
		check(t, n.Commit(bg, "ns/1/"+img.chain(i), "k", opt))
		parent = "ns/1/" + img.chain(i)
	}
	if lines := n.log.lines("not lazy"); len(lines) != 1 || !strings.Contains(lines[0], img.chain(0)) {
		t.Errorf("want one line, got:\n%s", n.log.b.String())
	}
	if n.images.asked() != 0 {
		t.Error("asked for an image without a name")
	}
}

// After a pull that was not lazy, the next one asks again.
func TestPullAgain(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	n.images.err = blockdev.ErrUnavailable
	_, err := n.Prepare(bg, "ns/1/a", "", snapshots.WithLabels(img.labels(0)))
	check(t, err)
	check(t, n.Remove(bg, "ns/1/a"))
	n.images.err = nil
	if _, err := n.Prepare(bg, "ns/2/a", "", snapshots.WithLabels(img.labels(0))); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("second pull: %v", err)
	}
}

// An image whose lower layers were unpacked before, and one on top of lazy layers
// whose upper layers cannot be lazy.
func TestMixedChains(t *testing.T) {
	n := newNode(t)
	ls := threeLayers(t)
	base := newImage("registry.test/base:1", ls[:1]...)
	img := newImage("registry.test/app:1", ls...)
	n.images.err = blockdev.ErrUnavailable
	_, fetched, err := n.pull(bg, base)
	check(t, err)
	if len(fetched) != 1 {
		t.Fatal("base is lazy")
	}
	n.images.err = nil
	n.images.publish(img)
	top, fetched, err := n.pull(bg, img)
	check(t, err)
	if len(fetched) != 0 {
		t.Fatalf("fetched %v", fetched)
	}
	checkThree(t, mounted(t, must(n.Prepare(bg, "c1", top))(t)))

	n2 := newNode(t)
	n2.images.publish(base)
	_, fetched, err = n2.pull(bg, base)
	check(t, err)
	if len(fetched) != 0 {
		t.Fatal("base is not lazy")
	}
	n2.images.err = blockdev.ErrUnavailable
	top, fetched, err = n2.pull(bg, img)
	check(t, err)
	if !slices.Equal(fetched, []int{0, 1, 2}) && !slices.Equal(fetched, []int{1, 2}) {
		t.Fatalf("fetched %v", fetched)
	}
	checkThree(t, mounted(t, must(n2.Prepare(bg, "c2", top))(t)))
}

// An image that shares layers with one on the node asks for the others only, and
// diffs go when, and only when, the last snapshot that uses them goes.
func TestSharedLayers(t *testing.T) {
	n := newNode(t)
	ls := threeLayers(t)
	other := newLayer(t, dir("opt", 0o755), file("opt/tool"))
	a := newImage("registry.test/a:1", ls[0], ls[1], ls[2])
	// The same diffs on another base: other chains.
	b := newImage("registry.test/b:1", other, ls[1], ls[2])
	n.images.publish(a, b)
	_, _, err := n.pull(bg, a)
	check(t, err)
	_, fetched, err := n.pull(bg, b)
	check(t, err)
	if len(fetched) != 0 {
		t.Fatalf("fetched %v", fetched)
	}
	have := n.images.requests[1].Have
	slices.SortFunc(have, func(a, b blockdev.Digest) int { return strings.Compare(a.Hex(), b.Hex()) })
	want := []blockdev.Digest{ls[1].digest, ls[2].digest}
	slices.SortFunc(want, func(a, b blockdev.Digest) int { return strings.Compare(a.Hex(), b.Hex()) })
	if !slices.Equal(have, want) {
		t.Errorf("Have is %v, want %v", have, want)
	}

	for i := 2; i >= 0; i-- {
		check(t, n.Remove(bg, a.chain(i)))
	}
	if len(n.data.removed) != 0 {
		t.Error("diffs removed before Cleanup")
	}
	check(t, n.Cleanup(bg))
	if !slices.Equal(n.data.removed, []blockdev.Digest{ls[0].diffID}) {
		t.Errorf("removed %v, want only the base of a", n.data.removed)
	}
	root := mounted(t, must(n.Prepare(bg, "c", b.chain(2)))(t))
	if read(t, root, "app/main") != "app/main" || read(t, root, "opt/tool") != "opt/tool" {
		t.Error("b does not read")
	}
	if err := n.Remove(bg, b.chain(2)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removed a snapshot in use: %v", err)
	}
	check(t, n.Remove(bg, "c"))
	for i := 2; i >= 0; i-- {
		check(t, n.Remove(bg, b.chain(i)))
	}
	check(t, n.Cleanup(bg))
	if len(n.data.dirs) != 0 {
		t.Errorf("diffs left: %v", n.data.dirs)
	}
	if d := n.recorded(); len(d) != 0 {
		t.Errorf("records left: %v", d)
	}
	if list := must(n.Images(bg))(t); len(list) != 0 {
		t.Errorf("images left: %+v", list)
	}
}

// What was known for one registry host is not offered to another.
func TestHaveIsPerHost(t *testing.T) {
	n := newNode(t)
	ls := threeLayers(t)
	a := newImage("one.test/a:1", ls...)
	n.images.publish(a)
	_, _, err := n.pull(bg, a)
	check(t, err)
	b := newImage("two.test/a:1", ls...)
	n.images.publish(b)
	_, err = n.Keep(bg, b.ref, b.manifest)
	check(t, err)
	if have := n.images.requests[1].Have; len(have) != 0 {
		t.Errorf("another host is told about %v", have)
	}
}

func TestRemoveFails(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/one:1", newLayer(t, file("hello")))
	n.images.publish(img)
	_, _, err := n.pull(bg, img)
	check(t, err)
	check(t, n.Remove(bg, img.chain(0)))
	n.data.removeErr = errors.New("busy")
	check(t, n.Cleanup(bg))
	if len(n.log.lines("an unused diff", "busy")) != 1 {
		t.Errorf("log:\n%s", n.log.b.String())
	}
	n.data.removeErr = nil
	check(t, n.Cleanup(bg))
	if n.data.has(img.layers[0]) {
		t.Error("not tried again")
	}
}

// An image in which one layer occurs twice, and one with empty layers.
func TestDuplicateAndEmptyLayers(t *testing.T) {
	n := newNode(t)
	ls := threeLayers(t)
	empty := newLayer(t)
	undo := newLayer(t, dir("etc", 0o755), file("etc/old"), file("app/.wh.main"))
	img := newImage("registry.test/dup:1", ls[0], empty, ls[1], ls[2], empty, undo, ls[1], ls[2])
	n.images.publish(img)
	top, fetched, err := n.pull(bg, img)
	check(t, err)
	if len(fetched) != 0 {
		t.Fatalf("fetched %v", fetched)
	}
	checkThree(t, mounted(t, must(n.Prepare(bg, "c", top))(t)))
	checkThree(t, mounted(t, must(n.View(bg, "v", top))(t)))
}

func TestManyLayers(t *testing.T) {
	for _, c := range []struct {
		name string
		lazy func(int) bool
	}{
		{"lazy", func(int) bool { return true }},
		{"every other", func(i int) bool { return i%2 == 0 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			var ls []layer
			for i := range 127 {
				// "shared" is implied in all but the first: each layer has a fix-up.
				entries := []*tar.Header{file(fmt.Sprintf("shared/f%d", i))}
				if i == 0 {
					entries = append([]*tar.Header{dir("shared", 0o1777)}, entries...)
				}
				ls = append(ls, newLayer(t, entries...))
			}
			img := newImage("registry.test/many:1", ls...)
			n.images.publish(img)
			parent := ""
			for i := range ls {
				labels := img.labels(i)
				if !c.lazy(i) {
					labels = map[string]string{labelRef: img.chain(i)}
				}
				key, name := fmt.Sprintf("ns/%d/k", i), "ns/1/"+img.chain(i)
				mounts, err := n.Prepare(bg, key, parent, snapshots.WithLabels(labels))
				if errdefs.IsAlreadyExists(err) {
					parent = img.chain(i)
					continue
				}
				check(t, err)
				if c.lazy(i) {
					t.Fatalf("layer %d is not lazy; log:\n%s", i, n.log.b.String())
				}
				check(t, applyTar(bg, mounts, ls[i].tar))
				check(t, n.Commit(bg, name, key, snapshots.WithLabels(labels)))
				parent = name
			}
			root := mounted(t, must(n.Prepare(bg, "c", parent))(t))
			entries := must(os.ReadDir(filepath.Join(root, "shared")))(t)
			if len(entries) != 127 {
				t.Errorf("%d of 127 files", len(entries))
			}
			if fi := must(os.Stat(filepath.Join(root, "shared")))(t); fi.Mode()&os.ModeSticky == 0 {
				t.Errorf("shared is %v", fi.Mode())
			}
			check(t, n.Remove(bg, "c"))
			check(t, n.Cleanup(bg))
			if left := must(os.ReadDir(filepath.Join(n.root, "l")))(t); len(left) != 0 {
				t.Errorf("links left: %v", left)
			}
		})
	}
}

// TestStartupProfiles: what is known of an image's start goes to the data path
// when its diffs are there, once for each of them.
func TestStartupProfiles(t *testing.T) {
	n := newNode(t)
	layers := threeLayers(t)
	img := newImage("docker.io/library/app:1", layers[0], layers[1], layers[1], layers[2])
	n.images.publish(img)
	p := blockdev.Profile{{Chunk: 0, Rank: 3}}
	n.images.change = func(i *image.Image) {
		i.Layers[1].Profile, i.Layers[2].Profile = p, p
	}
	if _, _, err := n.pull(t.Context(), img); err != nil {
		t.Fatal(err)
	}
	n.data.set(func() {
		want := []blockdev.DiffProfile{{Diff: layers[1].diffID, Profile: p}}
		if !reflect.DeepEqual(n.data.startup, want) {
			t.Errorf("told of %v, want %v", n.data.startup, want)
		}
	})
}
