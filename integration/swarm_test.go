package integration

import (
	"os"
	"testing"
	"time"
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
