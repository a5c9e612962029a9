package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
)

// Pulls, containers, removals and cleanups of images that share layers, all at
// once: no diff goes that a snapshot names, no container lacks a directory, and in
// the end nothing is left.
func TestStress(t *testing.T) { synctest.Test(t, testStress) }

func testStress(t *testing.T) {
	n := newNode(t)
	ls := threeLayers(t)
	other := newLayer(t, dir("opt", 0o755), file("opt/tool"))
	images := []testImage{
		newImage("registry.test/a:1", ls...),
		newImage("registry.test/b:1", other, ls[1], ls[2]),
		newImage("registry.test/c:1", ls[0], other),
		newImage("registry.test/d:1", ls[0], ls[1], other, ls[2]),
	}
	n.images.publish(images...)
	n.data.onRemove = func(id blockdev.Digest) {
		err := n.Walk(bg, func(_ context.Context, info snapshots.Info) error {
			if info.Labels[labelDiff] == id.String() {
				t.Errorf("diff of snapshot %s is being removed", info.Name)
			}
			return nil
		})
		if err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	}
	// What a worker may meet because another has removed a snapshot, or its diff after
	// the chain was read.
	gone := func(err error) bool {
		return errors.Is(err, os.ErrNotExist) || errors.Is(err, blockdev.ErrNotFound) ||
			errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) || errdefs.IsAlreadyExists(err)
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for r := range 12 {
				img := images[(w+r)%len(images)]
				top, _, err := n.pull(bg, img)
				if err != nil {
					if !gone(err) {
						t.Error(err)
					}
					continue
				}
				key := fmt.Sprintf("ns/%d/c%d", r, w)
				mounts, err := n.Prepare(bg, key, top)
				if err == nil {
					for _, o := range mounts[0].Options {
						v, ok := strings.CutPrefix(o, "lowerdir=")
						for dir := range strings.SplitSeq(v, ":") {
							if _, err := os.Stat(dir); ok && err != nil {
								t.Errorf("container without a layer: %v", err)
							}
						}
					}
					if err := n.Remove(bg, key); err != nil {
						t.Error(err)
					}
				} else if !gone(err) {
					t.Error(err)
				}
				for i := len(img.layers) - 1; i >= 0; i-- {
					if err := n.Remove(bg, img.chain(i)); err != nil && !gone(err) {
						t.Error(err)
					}
				}
				if w%2 == 0 {
					if err := n.Cleanup(bg); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if lines := n.log.lines("not lazy"); len(lines) > 0 {
		t.Errorf("log:\n%s", strings.Join(lines, "\n"))
	}
	for { // top down, until nothing is left
		var names []string
		check(t, n.Walk(bg, func(_ context.Context, info snapshots.Info) error {
			names = append(names, info.Name)
			return nil
		}))
		if len(names) == 0 {
			break
		}
		for _, name := range names {
			if err := n.Remove(bg, name); err != nil && !gone(err) {
				t.Fatal(err)
			}
		}
	}
	time.Sleep(time.Hour) // pulls that others had broken off have ended
	check(t, n.Cleanup(bg))
	if len(n.data.dirs) != 0 {
		t.Errorf("diffs left: %v", n.data.dirs)
	}
	if d := n.recorded(); len(d) != 0 {
		t.Errorf("records left: %v", d)
	}
	if left := must(os.ReadDir(n.dir("")))(t); len(left) != 0 {
		t.Errorf("directories left: %v", left)
	}
}
