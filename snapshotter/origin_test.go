package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// A diff's image and layer are known as long as the image is here; that is what log
// lines name.
func TestOrigins(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	_, _, err := n.pull(bg, img)
	check(t, err)
	l := img.layers[1]
	found := must(n.Origins(l.diffID))(t)
	if len(found) != 1 || found[0].Ref != img.ref || found[0].Manifest != img.manifest || found[0].Digest != l.digest || found[0].Size != int64(len(l.tar)) {
		t.Errorf("%+v", found)
	}
	if got := fmt.Sprint(n.Describe(l.diffID)...); got != fmt.Sprint("image", img.ref, "layer", l.digest) {
		t.Errorf("described as %s", got)
	}
	if d := n.Describe(blockdev.Sum([]byte("other"))); d != nil {
		t.Errorf("a diff of no image is described as %v", d)
	}
}

// Many reads that miss chunks have the supernode open the image once; who leaves
// does not end it; and the indexes, which are here, are not sent again.
func TestRewarm(t *testing.T) {
	n := newNode(t)
	img := newImage("registry.test/x:1", threeLayers(t)...)
	n.images.publish(img)
	_, _, err := n.pull(bg, img)
	check(t, err)
	before := n.images.asked()
	gate := make(chan struct{})
	n.images.mu.Lock()
	n.images.gate = gate
	n.images.mu.Unlock()
	gone, leave := context.WithCancel(bg)
	leave()
	if err := n.Rewarm(gone, img.layers[0].diffID); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that has left: %v", err)
	}
	var wg sync.WaitGroup
	for i := range 9 {
		wg.Go(func() { check(t, n.Rewarm(bg, img.layers[i%3].diffID)) })
	}
	close(gate)
	wg.Wait()
	check(t, n.Rewarm(bg, img.layers[0].diffID)) // just done
	if asked := n.images.asked() - before; asked != 1 {
		t.Errorf("the supernode was asked %d times", asked)
	}
	n.images.mu.Lock()
	have := n.images.requests[before].Have
	n.images.mu.Unlock()
	if len(have) != 3 {
		t.Errorf("the request names %d layers as known, want 3", len(have))
	}
	if err := n.Rewarm(bg, blockdev.Sum([]byte("other"))); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("a diff of no image: %v", err)
	}
	check(t, n.Close())
	if err := n.Rewarm(bg, img.layers[0].diffID); err == nil {
		t.Error("a closed snapshotter rewarms")
	}
}
