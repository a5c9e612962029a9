package roster

import (
	"testing"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/p2p/host"
)

// TestSupernodesChange: while nodes run, a second supernode is added, and the first one
// left out. Its groups move with what is known of them, and nobody is a member there any
// more, at once and not when a lease is over.
func TestSupernodesChange(t *testing.T) {
	first, second := newSuper(t, nil), newSuper(t, nil)
	a, b := newNode(t, nil, first), newNode(t, nil, first)
	for _, n := range []*aNode{a, b} {
		n.has(t, first, theImage)
	}
	a.knows(t, theImage, a, b)
	in := func(s *super) (members, images int) {
		for _, m := range s.Members() {
			members++
			images += m.Images
		}
		return members, images
	}
	set := func(supers ...*super) {
		t.Helper()
		var infos []peer.AddrInfo
		for _, s := range supers {
			infos = append(infos, s.info())
		}
		for _, n := range []*aNode{a, b} {
			if err := n.SetSupernodes(infos); err != nil {
				t.Fatal(err)
			}
		}
	}
	siblings := func(s *super, ids ...peer.ID) {
		t.Helper()
		if err := s.SetSiblings(ids); err != nil {
			t.Fatal(err)
		}
	}

	// What cannot be is refused, and changes nothing.
	own := peer.AddrInfo{ID: a.id(), Addrs: a.host.Addrs()}
	for _, bad := range [][]peer.AddrInfo{nil, {second.info(), second.info()}, {first.info(), own}} {
		if err := a.SetSupernodes(bad); err == nil {
			t.Errorf("%v: no error", bad)
		}
	}
	if err := a.Ready(t.Context(), second.host.ID()); err == nil {
		t.Error("a refused change has added a supernode")
	}

	siblings(first, second.host.ID())
	siblings(second, first.host.ID())
	set(first, second)
	for _, n := range []*aNode{a, b} {
		ready(t, n, first)
		ready(t, n, second)
	}
	set(second)
	if a.View(theImage) == nil || b.View(theImage) == nil {
		t.Error("a node forgets who is in a group whose supernode is left out")
	}
	eventually(t, "the group is at the second supernode", func() bool { _, images := in(second); return images == 2 })
	eventually(t, "nobody is a member of the first", func() bool { n, _ := in(first); return n == 0 })
	if n := first.metric(t, "shoal_supernode_leases_expired_total"); n != 0 {
		t.Errorf("%v nodes have left without a word", n)
	}
	if a.Ready(t.Context(), first.host.ID()) == nil {
		t.Error("a node is still let in by the supernode that it has left out")
	}
	a.knows(t, theImage, a, b)
	eventually(t, "the first one is disconnected", func() bool {
		return a.host.Network().Connectedness(first.host.ID()) != network.Connected
	})

	// Grants of one that is no sibling any more do not count.
	siblings(second)
	c := newNode(t, nil, second)
	ready(t, c, second)
	c.has(t, first, theImage)
	d := newNode(t, nil, second)
	d.has(t, second, theImage)
	a.knows(t, theImage, a, b, d)
}

// TestSupernodeMoves: a supernode that comes back at another address is joined there.
func TestSupernodeMoves(t *testing.T) {
	key := newKey(t)
	s := newSuper(t, func(c *Config) { c.Key = key })
	a := newNode(t, nil, s)
	a.has(t, s, theImage)
	a.knows(t, theImage, a)
	if err := s.host.Network().Close(); err != nil {
		t.Fatal(err)
	}
	moved := newSuper(t, func(c *Config) { c.Key = key })
	if err := a.SetSupernodes([]peer.AddrInfo{moved.info()}); err != nil {
		t.Fatal(err)
	}
	ready(t, a, moved)
	a.has(t, moved, theImage)
	a.knows(t, theImage, a)
}

// TestTrust: the identity of another kind is refused as a sibling, and changes nothing.
func TestTrust(t *testing.T) {
	s := newSuper(t, nil)
	_, public, err := crypto.GenerateKeyPair(crypto.Secp256k1, 0)
	if err != nil {
		t.Fatal(err)
	}
	other, err := peer.IDFromPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	good, err := host.ID(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	if s.SetSiblings([]peer.ID{good, other}) == nil || s.siblings.has(good) {
		t.Error("it is taken for a supernode")
	}
}
