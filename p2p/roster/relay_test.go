package roster

import (
	"context"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
)

// named is whom the supernode names to n.
func (s *super) named(ctx context.Context, n *aNode) []peer.ID {
	var ids []peer.ID
	for _, r := range s.Relays(ctx, n.id().String(), theImage) {
		ids = append(ids, host.FromKey(r.Key))
	}
	return ids
}

func nodesIn(t *testing.T, s *super, zone string, count int) (nodes []*aNode) {
	for range count {
		n := newNode(t, func(c *members.Config) { c.Zone = zone }, s)
		ready(t, n, s)
		nodes = append(nodes, n)
	}
	return nodes
}

// The first few of a zone get an image's indexes from the supernode, others from
// these, each of which is named to few.
func TestRelays(t *testing.T) {
	s := newSuper(t, nil)
	nodes := nodesIn(t, s, "east", relayDirect+2)
	for _, n := range nodes[:relayDirect] {
		if ids := s.named(t.Context(), n); len(ids) > 0 {
			t.Errorf("one of the first nodes is sent to %v", ids)
		}
	}
	// Who comes next waits for one of them.
	a, next, last := nodes[0], nodes[relayDirect], nodes[relayDirect+1]
	got := make(chan []peer.ID, 1)
	go func() { got <- s.named(t.Context(), next) }()
	select {
	case ids := <-got:
		t.Fatalf("nobody has the indexes, and a node is sent to %v", ids)
	case <-time.After(50 * time.Millisecond):
	}
	a.has(t, s, theImage)
	if ids := <-got; len(ids) != 1 || ids[0] != a.id() {
		t.Fatalf("a node is sent to %v, want %v", ids, a.id())
	}
	for range relayChildren - 1 {
		if ids := s.named(t.Context(), last); len(ids) != 1 || ids[0] != a.id() {
			t.Fatalf("a node is sent to %v, want %v", ids, a.id())
		}
	}
	// That was its part; and whom nobody can serve waits no longer than that.
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if ids := s.named(ctx, last); len(ids) > 0 {
		t.Errorf("a node is sent to %v", ids)
	}
	if ids := s.named(t.Context(), last); len(ids) > 0 {
		t.Errorf("a node is sent to %v", ids)
	}
	// Each zone has its own.
	for _, n := range nodesIn(t, s, "west", 1) {
		if ids := s.named(t.Context(), n); len(ids) > 0 {
			t.Errorf("the first node of another zone is sent to %v", ids)
		}
	}
}

// Who was there before the supernode began to look counts, who has left does not, and
// nobody is sent to himself.
func TestRelaysOfAGroup(t *testing.T) {
	s := newSuper(t, nil)
	nodes := nodesIn(t, s, "", relayDirect+2)
	self, gone := nodes[0], nodes[1]
	for _, n := range nodes {
		n.has(t, s, theImage)
	}
	self.knows(t, theImage, nodes...)
	gone.Leave(theImage)
	self.knows(t, theImage, append([]*aNode{self}, nodes[2:]...)...)
	times := map[peer.ID]int{}
	for range relayChildren * relayDirect {
		ids := s.named(t.Context(), self)
		if len(ids) == 0 {
			t.Fatal("nobody was named")
		}
		times[ids[0]]++
		for _, id := range ids {
			if id == self.id() || id == gone.id() {
				t.Errorf("sent to %v, itself or one that has left", id)
			}
		}
	}
	for _, n := range nodes[2:] {
		if times[n.id()] != relayChildren {
			t.Errorf("%v was named %d times, not %d", n.id(), times[n.id()], relayChildren)
		}
	}
	if ids := s.named(t.Context(), self); len(ids) > 0 {
		t.Errorf("all have done their part, and %v are named", ids)
	}
}

// A node may connect to whom the supernode has named, and be served there, before it
// has heard who is in the group.
func TestEnter(t *testing.T) {
	s := newSuper(t, nil)
	nodes := nodesIn(t, s, "", 2)
	a, b := nodes[0], nodes[1]
	serveEcho(a.host)
	a.has(t, s, theImage)
	a.knows(t, theImage, a)
	grant, err := s.Grant(b.id().String(), theImage, registryHost)
	if err != nil {
		t.Fatal(err)
	}
	leave := b.Enter(&image.Image{Manifest: theImage, Grant: grant}, []peer.AddrInfo{{ID: a.id()}})
	if !canSpeak(b.host, a.host) {
		t.Error("the named node does not answer")
	}
	b.knows(t, theImage, a, b)
	leave()
	a.knows(t, theImage, a)
	// Who was in the group before stays in it.
	a.Enter(&image.Image{Manifest: theImage, Grant: grant}, nil)()
	if a.View(theImage) == nil {
		t.Error("a has left the group")
	}
}
