package snapshotter

import (
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

// fetching are the diffs that the data path was asked to fetch, less those that it
// was told to leave.
type fetching struct {
	Data
	on   map[blockdev.Digest]bool
	here map[blockdev.Digest]bool
}

func (f *fetching) Incomplete(id blockdev.Digest) bool { return !f.here[id] }

func (f *fetching) Prefetch(ids ...blockdev.Digest) {
	for _, id := range ids {
		f.on[id] = true
	}
}

func (f *fetching) StopPrefetch(ids ...blockdev.Digest) {
	for _, id := range ids {
		delete(f.on, id)
	}
}

// TestWishes: what is fetched, and when the wishes are looked at again.
func TestWishes(t *testing.T) {
	a, b := blockdev.Sum([]byte("a")), blockdev.Sum([]byte("b"))
	now := time.Now()
	old := now.Add(-time.Hour)
	all := []blockdev.Digest{a, b}
	only := all[:1]
	ids := func(ids ...string) map[string]struct{} {
		m := make(map[string]struct{})
		for _, id := range ids {
			m[id] = struct{}{}
		}
		return m
	}
	for _, tt := range []struct {
		name      string
		do        func(*wishes)
		running   map[string]struct{}
		here      []blockdev.Digest
		afterExit bool
		want      []blockdev.Digest
		next      time.Duration
	}{
		{"runs", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, ids("1"), nil, false, all, wishInterval},
		{"begins", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: now}) }, ids(), nil, false, all, wishInterval},
		{"never began", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, ids(), nil, false, nil, 0},
		{"has ended", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: now, ran: true}) }, ids(), nil, false, nil, 0},
		{"has ended, and is wanted still", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, ids(), nil, true, all, wishInterval},
		{"mounts are not known", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, nil, nil, false, all, wishInterval},
		{"a view", func(w *wishes) { w.start("k", container{id: "1", view: true, diffs: all, since: old}) }, ids(), nil, false, all, wishInterval},
		{"is removed", func(w *wishes) {
			w.start("k", container{id: "1", diffs: all, since: now})
			w.end("k")
		}, ids("1"), nil, false, nil, 0},
		{"is removed, and is wanted still", func(w *wishes) {
			w.start("k", container{id: "1", diffs: all, since: now})
			w.end("k")
		}, ids(), nil, true, all, wishInterval},
		{"is removed, and is here", func(w *wishes) {
			w.start("k", container{id: "1", diffs: all, since: now})
			w.end("k")
		}, ids(), all, true, nil, 0},
		{"another shares a layer", func(w *wishes) {
			w.start("k", container{id: "1", diffs: all, since: old})
			w.start("l", container{id: "2", diffs: only, since: old})
		}, ids("2"), nil, false, only, wishInterval},
		{"is complete", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, ids("1"), all, false, nil, 0},
		{"half is here", func(w *wishes) { w.start("k", container{id: "1", diffs: all, since: old}) }, ids("1"), all[1:], false, only, wishInterval},
		{"found running", func(w *wishes) { w.found("k", container{id: "1", diffs: all, since: old}) }, ids("1"), nil, false, all, wishInterval},
		{"found ended", func(w *wishes) { w.found("k", container{id: "1", diffs: all, since: old}) }, ids(), nil, false, nil, 0},
		{"found, may begin", func(w *wishes) { w.found("k", container{id: "1", diffs: all, since: now}) }, ids(), nil, false, nil, wishInterval},
		{"found is older than started", func(w *wishes) {
			w.start("k", container{id: "1", diffs: all, since: now})
			w.found("k", container{id: "1", diffs: all, since: old})
		}, ids(), nil, false, all, wishInterval},
		{"pulled", func(w *wishes) { w.pull("i", pulled{all, now.Add(time.Second)}) }, ids(), nil, false, nil, time.Second},
		{"pulled before", func(w *wishes) { w.pull("i", pulled{all, now}) }, ids(), nil, false, all, wishInterval},
		{"pulled, and is here", func(w *wishes) { w.pull("i", pulled{all, now}) }, ids(), all, false, nil, 0},
		{"pulled and followed", func(w *wishes) {
			w.pull("i", pulled{all, now})
			w.follow("i")
		}, ids(), nil, false, nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := &fetching{on: make(map[blockdev.Digest]bool), here: make(map[blockdev.Digest]bool)}
			for _, id := range tt.here {
				f.here[id] = true
			}
			w := newWishes(f, "/x", tt.afterExit)
			w.running = func() map[string]struct{} { return tt.running }
			tt.do(w)
			for range 2 { // the second look changes nothing
				if next := w.review(now); next != tt.next {
					t.Errorf("looks again in %v, want %v", next, tt.next)
				}
				for _, id := range all {
					if got, want := f.on[id] && !f.here[id], slices.Contains(tt.want, id); got != want {
						t.Errorf("diff %v is fetched: %v, want %v", id, got, want)
					}
				}
			}
		})
	}
}

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

// TestPrefetchEnds: prefetch of an image begins with a container, ends with the last
// one, though its snapshot stays, and begins again with the next. The path has
// characters in it that the kernel writes otherwise.
func TestPrefetchEnds(t *testing.T) {
	n := newNode(t, func(c *Config) { c.Root = filepath.Join(filepath.Dir(c.Root), "a=b c") })
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
	waitFor(t, "the container is seen", func() bool {
		n.wishes.mu.Lock()
		defer n.wishes.mu.Unlock()
		return n.wishes.containers["ns/9/job"].ran
	})
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

// TestAfterPull: an image that no container has followed is remembered across
// restarts, and one that a container has followed is not.
func TestAfterPull(t *testing.T) {
	after := func(c *Config) { c.PrefetchAfterPull = true }
	n := newNode(t, after)
	img := newImage("registry.test/app:1", threeLayers(t)...)
	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	waiting := func() bool {
		n.wishes.mu.Lock()
		defer n.wishes.mu.Unlock()
		return len(n.wishes.pulls) == 1 && len(n.wishes.pulls[string((&imageRecord{Ref: img.ref, Manifest: img.manifest}).key())].diffs) == 3
	}
	if !waiting() {
		t.Error("a pull is not remembered")
	}
	n.crash(after)
	if !waiting() {
		t.Error("a pull is forgotten at a restart")
	}
	must(n.View(bg, "v", top, snapshots.WithLabels(map[string]string{"a": "b"})))(t)
	if waiting() {
		t.Error("a pull is remembered though it was followed")
	}
	n.crash(after)
	if waiting() {
		t.Error("a pull that was followed is remembered after a restart")
	}
	other := newNode(t) // the config does not want it
	other.images.publish(img)
	_, _, err = other.pull(bg, img)
	check(t, err)
	if len(other.wishes.pulls) != 0 {
		t.Error("a pull is remembered against the config")
	}
}
