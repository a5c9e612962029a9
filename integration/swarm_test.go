package integration

import (
	"crypto/sha256"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestNodesShare: nodes pull one after the other. The supernode sends the image
// about once, the others get it from nodes. And when a node dies while another
// one reads, no read fails.
func TestNodesShare(t *testing.T) {
	s := newSite(t, "")
	content := bigContent(8)
	for seed := range 40 { // so much that it is not there before the groups are known
		content += bigContent(100 + seed)
	}
	ref := s.push(t, "shared", layer(t, dir("a"), file("a/one", content)))
	im := must(s.registry.Image(t.Context(), "shared", "v1"))(t)
	noError(t, s.node.Pull(t.Context(), im))
	unmountFirst := must(s.node.Mount(t.Context(), im, "view1", s.Path("view1")))(t)
	noError(t, s.node.WaitLocal(t.Context(), ref, 60*time.Second))
	once := must(s.supernode.Metric(t.Context(), "shoal_p2p_sent_bytes_total"))(t)
	second := must(s.StartNode(t.Context(), "second", s.supernode.Address, ""))(t)
	noError(t, second.Pull(t.Context(), im))
	unmountSecond := must(second.Mount(t.Context(), im, "view2", s.Path("view2")))(t)
	noError(t, second.WaitLocal(t.Context(), ref, 60*time.Second))
	third := must(s.StartNode(t.Context(), "third", s.supernode.Address, ""))(t)
	noError(t, third.Pull(t.Context(), im))
	unmount := must(third.Mount(t.Context(), im, "view", s.Path("view")))(t)
	noError(t, unmountSecond())
	noError(t, second.Kill())
	got := must(os.ReadFile(s.Path("view", "a", "one")))(t)
	if string(got) != content {
		t.Error("a file has other content than was pushed")
	}
	noError(t, third.WaitLocal(t.Context(), ref, 60*time.Second))
	noError(t, unmount())
	noError(t, unmountFirst())
	all := must(s.supernode.Metric(t.Context(), "shoal_p2p_sent_bytes_total"))(t)
	shared := must(third.Metric(t.Context(), "shoal_node_received_bytes_total"))(t)
	t.Logf("supernode sent %.0f bytes to one node, %.0f to three; the third received %.0f", once, all, shared)
	if all > 1.6*once {
		t.Errorf("the supernode has sent %.0f bytes to three nodes, %.0f to the first", all, once)
	}
}

// TestIndexesGoFromNodeToNode: of eight nodes that pull at once the supernode gives an
// image's indexes to the first ones, and these to the others. One more comes when the
// node that it is sent to has died.
func TestIndexesGoFromNodeToNode(t *testing.T) {
	s := newSite(t, "")
	entries := []entry{dir("a")}
	for i := range 4000 { // whose names do not compress
		entries = append(entries, file(fmt.Sprintf("a/%x", sha256.Sum256([]byte{byte(i), byte(i >> 8)})), fmt.Sprint(i)))
	}
	ref := s.push(t, "names", layer(t, entries...))
	im := must(s.registry.Image(t.Context(), "names", "v1"))(t)
	must(s.Run(t.Context(), "shoal", "prefetch", "--control", s.node.Control, ref))(t)
	nodes := []*lab.Node{s.node}
	for i := range 7 {
		nodes = append(nodes, must(s.StartNode(t.Context(), fmt.Sprint("n", i), s.supernode.Address, ""))(t))
	}
	view := func(n *lab.Node, name string) {
		unmount, err := n.Mount(t.Context(), im, name, s.Path(name))
		if err != nil {
			t.Error(err)
			return
		}
		if list, err := os.ReadDir(s.Path(name, "a")); err != nil || len(list) != 4000 {
			t.Errorf("%s: %d files, %v", n.Name, len(list), err)
		}
		noError(t, unmount())
	}
	errs := make([]error, len(nodes))
	var all sync.WaitGroup
	for i, n := range nodes {
		all.Go(func() { errs[i] = n.Pull(t.Context(), im) })
	}
	all.Wait()
	named := must(s.supernode.Metric(t.Context(), "shoal_supernode_relayed_images_total"))(t)
	var relayed float64
	for i, n := range nodes {
		noError(t, errs[i])
		view(n, fmt.Sprint("view", i))
		relayed += must(n.Metric(t.Context(), "shoal_node_relayed_index_bytes_total"))(t)
	}
	t.Logf("%.0f of %d pulls were sent to other nodes, and got %.0f bytes there", named, len(nodes), relayed)
	if named == 0 || relayed == 0 {
		t.Error("the supernode gave all indexes itself")
	}
	late := must(s.StartNode(t.Context(), "late", s.supernode.Address, ""))(t)
	for _, n := range nodes {
		noError(t, n.Kill())
	}
	noError(t, late.Pull(t.Context(), im))
	view(late, "viewlate")
}
