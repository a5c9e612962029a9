package integration

import (
	"os"
	"testing"
	"time"
)

// TestPullWithoutContainerd: the lab's stand-in for containerd's pull gets what
// containerd gets. It drives the nodes that have no containerd of their own.
func TestPullWithoutContainerd(t *testing.T) {
	s := newSite(t, "")
	content := bigContent(1)
	ref := s.push(t, "app", layer(t, dir("a"), file("a/one", content)), layer(t, file("two", "2")))
	im := must(s.registry.Image(t.Context(), "app", "v1"))(t)
	if im.Ref != ref || len(im.Layers) != 2 {
		t.Fatalf("the registry has %+v, pushed was %s", im, ref)
	}
	noError(t, s.node.Pull(t.Context(), im))
	unmount := must(s.node.Mount(t.Context(), im, "view", s.Path("view")))(t)
	got := must(os.ReadFile(s.Path("view", "a", "one")))(t)
	if string(got) != content {
		t.Error("a file through the mount has other content than was pushed")
	}
	noError(t, s.node.WaitLocal(t.Context(), ref, 30*time.Second))
	noError(t, unmount())
	noError(t, s.node.RemoveImage(t.Context(), im))
	if listed(t, s.node, ref) {
		t.Error("the image is still there after its snapshots were removed")
	}
}
