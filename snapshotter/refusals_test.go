package snapshotter

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/snapshotter/images"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

// TestRefusals: why an image is not lazy is remembered until it is, and counted by
// its cause.
func TestRefusals(t *testing.T) {
	var mu sync.Mutex
	var pulled []string
	n := newNode(t, withRules(t, policy.Rules{Never: []string{"registry.test/never"}}), func(c *nodeConfig) {
		c.Pulled = func(ref string, why *images.Refusal) {
			mu.Lock()
			defer mu.Unlock()
			if why != nil {
				ref += " " + string(why.Cause)
			}
			pulled = append(pulled, ref)
		}
	})
	never := newImage("registry.test/never:1", newLayer(t, file("n")))
	app := newImage("registry.test/app:1", threeLayers(t)...)
	gone := newImage("registry.test/gone:1", newLayer(t, file("g")))
	n.images.publish(never)
	for _, img := range []testImage{never, app, gone} {
		_, fetched, err := n.pull(bg, img)
		check(t, err)
		if len(fetched) == 0 {
			t.Errorf("%s is lazy", img.ref)
		}
	}
	list := n.Refusals()
	if len(list) != 3 || list[0].Ref != never.ref || list[0].Cause != images.CauseConfig || list[2].Ref != gone.ref || list[2].Cause != images.CauseNotFound ||
		!strings.Contains(list[0].Why, "images.never") || time.Since(list[2].At) > time.Minute {
		t.Errorf("remembered: %+v", list)
	}
	if n.Refused(images.CauseConfig) != 1 || n.Refused(images.CauseNotFound) != 2 || n.Refused(images.CauseSlow) != 0 {
		t.Error("the causes are not counted, or more than once for an image of several layers")
	}

	mu.Lock()
	if want := []string{never.ref + " config", app.ref + " not_found", gone.ref + " not_found"}; !slices.Equal(pulled, want) {
		t.Errorf("observed %q, want %q", pulled, want)
	}
	mu.Unlock()

	// One that has become lazy is not listed any more; it is counted all the same.
	for i := 2; i >= 0; i-- {
		check(t, n.Remove(bg, "ns/1/"+app.chain(i)))
	}
	n.images.publish(app)
	// What was decided may count for another while.
	waitFor(t, "the image is lazy", func() bool {
		top, fetched, err := n.pull(bg, app)
		check(t, err)
		if len(fetched) == 0 {
			return true
		}
		for i := 2; i >= 0; i-- {
			check(t, n.Remove(bg, "ns/1/"+app.chain(i)))
		}
		_ = top
		return false
	})
	for _, r := range n.Refusals() {
		if r.Ref == app.ref {
			t.Errorf("an image that is lazy is listed: %+v", r)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if last := pulled[len(pulled)-1]; last != app.ref {
		t.Errorf("observed %q at last, want that %s is lazy", last, app.ref)
	}
}

// TestArtifact: of an artifact, which the mirror has seen, containerd unpacks nothing, so
// that no Prepare comes; the log and the list say so all the same. Of an image that has a
// Prepare the log says so once.
func TestArtifact(t *testing.T) {
	n := newNode(t)
	artifact, image1 := newImage("registry.test/artifact:1", newLayer(t, file("a"))), newImage("registry.test/image:1", threeLayers(t)...)
	n.images.set(func() { n.images.err = fmt.Errorf("of an artifact: %w", blockdev.ErrUnsupported) })
	for _, img := range []testImage{artifact, image1} {
		n.Begin(repository(img), "1", img.manifest, nil, image.Credential{})
		n.Await(bg, repository(img), img.manifest)
	}
	_, fetched, err := n.pull(bg, image1)
	check(t, err)
	if len(fetched) != 3 {
		t.Errorf("containerd fetched %d layers, want all 3", len(fetched))
	}
	list := n.Refusals()
	if len(list) != 2 || list[0].Ref != artifact.ref || list[0].Cause != images.CauseUnsupported || !strings.Contains(list[0].Why, "of an artifact") || list[1].Ref != image1.ref {
		t.Errorf("remembered: %+v", list)
	}
	for _, img := range []testImage{artifact, image1} {
		if lines := n.log.lines(img.ref); len(lines) != 1 || !strings.Contains(lines[0], "cannot be lazy") {
			t.Errorf("log of %s: %q, want one line", img.ref, lines)
		}
	}
	// Nothing else is final: the next attempt may go well, and containerd asks.
	n.images.set(func() { n.images.err = blockdev.ErrUnavailable })
	late := newImage("registry.test/late:1", newLayer(t, file("l")))
	n.Begin(repository(late), "1", late.manifest, nil, image.Credential{})
	n.Await(bg, repository(late), late.manifest)
	if list := n.Refusals(); len(list) != 2 {
		t.Errorf("remembered: %+v", list)
	}
}

// TestEmptyImageVolume: a volume of an image that has no layers is refused, since the
// container would find no file in it; one with layers, and a container without an image,
// are not.
func TestEmptyImageVolume(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/volume:1", newLayer(t, file("a")))
	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	key := "k8s.io/7//run/containerd/io.containerd.grpc.v1.cri/image-volumes/pod/" + img.manifest.Hex()
	if _, err := n.Prepare(bg, key, ""); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), img.manifest.String()) {
		t.Errorf("a volume without layers: %v", err)
	}
	must(n.Prepare(bg, key, top))(t)
	must(n.Prepare(bg, "k8s.io/8/"+img.manifest.Hex(), ""))(t)
	must(n.Prepare(bg, "k8s.io/9//run/other/image-volumes/pod/name", ""))(t)
}

// TestStaleName: an image that was removed is not listed again when another one with
// the same layers comes.
func TestStaleName(t *testing.T) {
	n := newNode(t)
	one := newImage("registry.test/app:one", threeLayers(t)...)
	two := newImage("registry.test/app:two", one.layers...)
	n.images.publish(one, two)
	_, _, err := n.pull(bg, one)
	check(t, err)
	for i := 2; i >= 0; i-- {
		check(t, n.Remove(bg, one.chain(i)))
	}
	check(t, n.Cleanup(bg))
	_, _, err = n.pull(bg, two)
	check(t, err)
	if list := must(n.Images(bg))(t); len(list) != 1 || list[0].Ref != two.ref {
		t.Errorf("listed: %+v", list)
	}
}
