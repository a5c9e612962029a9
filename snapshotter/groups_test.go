package snapshotter

import (
	"slices"
	"sync"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// fakeGroups keeps what it was told.
type fakeGroups struct {
	mu     sync.Mutex
	diffs  map[blockdev.Digest][]blockdev.Digest
	grants map[blockdev.Digest]string
}

func (g *fakeGroups) Join(manifest blockdev.Digest, diffs []blockdev.Digest, grant []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.diffs == nil {
		g.diffs, g.grants = map[blockdev.Digest][]blockdev.Digest{}, map[blockdev.Digest]string{}
	}
	g.diffs[manifest], g.grants[manifest] = diffs, string(grant)
}

func (g *fakeGroups) Leave(manifest blockdev.Digest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.diffs, manifest)
}

func (g *fakeGroups) in(manifest blockdev.Digest) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.diffs[manifest] != nil
}

// A node is in an image's group from the pull until the removal, and again after
// a restart, with what the supernode gave it to join.
func TestGroups(t *testing.T) {
	g := &fakeGroups{}
	with := func(g *fakeGroups) func(*nodeConfig) { return func(c *nodeConfig) { c.Groups = g } }
	n := newNode(t, with(g))
	shared := newLayer(t, file("shared"))
	a := newImage("registry.test/a:1", shared, newLayer(t, file("a")))
	b := newImage("registry.test/b:1", shared, newLayer(t, file("b")))
	n.images.change = func(img *image.Image) { img.Grant = []byte("granted") }
	for _, img := range []testImage{a, b} {
		n.images.publish(img)
		_, _, err := n.pull(bg, img)
		check(t, err)
	}
	if !g.in(a.manifest) || !g.in(b.manifest) || len(g.diffs[a.manifest]) != 2 || g.grants[a.manifest] != "granted" {
		t.Fatalf("after the pulls: %v", g.diffs)
	}
	g = &fakeGroups{}
	n.crash(with(g))
	if !g.in(a.manifest) || !g.in(b.manifest) || g.grants[b.manifest] != "granted" {
		t.Fatalf("after a restart: %v", g.diffs)
	}
	for _, i := range slices.Backward([]int{0, 1}) {
		if err := n.Remove(bg, a.chain(i)); err != nil && i == 1 {
			t.Fatal(err) // the lower one is b's as well
		}
	}
	check(t, n.Cleanup(bg))
	if g.in(a.manifest) || !g.in(b.manifest) {
		t.Errorf("after the removal of one of two: %v", g.diffs)
	}
	must(n.Keep(bg, a.ref, a.manifest))(t)
	if !g.in(a.manifest) {
		t.Error("a kept image is not shared")
	}
	if !n.Evict(bg) {
		t.Error("a kept image is not evicted")
	}
	if g.in(a.manifest) {
		t.Error("an evicted image is shared")
	}
}

// slowLeave are groups that it takes long to leave one of.
type slowLeave struct {
	fakeGroups
	slow           blockdev.Digest
	begun, through chan struct{}
	once           sync.Once
}

func (g *slowLeave) Leave(manifest blockdev.Digest) {
	if manifest == g.slow {
		g.once.Do(func() { close(g.begun) })
		<-g.through
	}
	g.fakeGroups.Leave(manifest)
}

// An image that is pulled again while what an earlier pull of it has left is being
// cleaned up stays on record.
func TestPulledWhileCleaningUp(t *testing.T) {
	a, b := newImage("registry.test/a:1", newLayer(t, file("a"))), newImage("registry.test/b:1", newLayer(t, file("b")))
	g := &slowLeave{slow: a.manifest, begun: make(chan struct{}), through: make(chan struct{})}
	n := newNode(t, func(c *nodeConfig) { c.Groups = g })
	n.images.publish(a, b)
	for _, img := range []testImage{a, b} {
		top, _, err := n.pull(bg, img)
		check(t, err)
		check(t, n.Remove(bg, top))
	}
	cleaned := make(chan error, 1)
	go func() { cleaned <- n.Cleanup(bg) }()
	<-g.begun
	_, fetched, err := n.pull(bg, b)
	check(t, err)
	if len(fetched) != 0 {
		t.Fatalf("the image is not lazy; log:\n%s", n.log.b.String())
	}
	close(g.through)
	check(t, <-cleaned)
	if list := must(n.Images(bg))(t); len(list) != 1 || list[0].Ref != b.ref {
		t.Errorf("the node has these images on record: %+v", list)
	}
	if !g.in(b.manifest) {
		t.Error("the node has left the group of an image that it has")
	}
}
