package snapshotter

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

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
