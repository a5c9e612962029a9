package roster

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/route"
)

var theImage = blockdev.Sum([]byte("an image"))

func ready(t *testing.T, n *aNode, s *super) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := n.Ready(ctx, s.host.ID()); err != nil {
		t.Fatal(err)
	}
}

func TestGroup(t *testing.T) {
	s := newSuper(t, nil)
	a := newNode(t, func(c *members.Config) { c.Zone, c.Rack = "east", "r1" }, s)
	b := newNode(t, func(c *members.Config) { c.Zone = "east" }, s)
	ready(t, a, s)
	ready(t, b, s)
	a.has(t, s, theImage)
	a.knows(t, theImage, a)
	b.has(t, s, theImage)
	a.knows(t, theImage, a, b)
	b.knows(t, theImage, a, b)
	if info, ok := b.Addrs(a.id()); !ok || len(info.Addrs) != 1 || !info.Addrs[0].Equal(a.host.Addrs()[0]) {
		t.Errorf("a is at %v, want %v", info.Addrs, a.host.Addrs())
	}
	for _, m := range b.View(theImage).Members {
		if m.ID == string(a.id()) && (m.Zone != "east" || m.Rack != "r1") {
			t.Errorf("a is %+v", m)
		}
	}
	if g := a.Groups(theImage); len(g) != 1 || g[0] != theImage {
		t.Errorf("groups with the diff: %v", g)
	}
	if err := a.Allowed(t.Context(), theImage, b.id()); err != nil {
		t.Error(err)
	}
	a.Watch(func(blockdev.Digest) bool { return true })
	eventually(t, "b knows that a has the whole image", func() bool {
		for _, m := range b.View(theImage).Members {
			if m.Full != (m.ID == string(a.id())) {
				return false
			}
		}
		return true
	})
	if n := s.metric(t, "shoal_supernode_holders"); n != 1 {
		t.Errorf("%v holders, one node has the whole image", n)
	}
	b.Leave(theImage)
	a.knows(t, theImage, a)
	if b.View(theImage) != nil {
		t.Error("b has a view of a group that it has left")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := a.Allowed(ctx, theImage, b.id()); err == nil {
		t.Error("b, which has left, is allowed")
	}
	// Another zone is another cell, known by its gateways.
	c := newNode(t, func(c *members.Config) { c.Zone = "west" }, s)
	c.has(t, s, theImage)
	eventually(t, "a knows of the other zone", func() bool {
		v := a.View(theImage)
		return len(v.Gateways) == 1 && v.Gateways[0].ID == string(c.id()) && v.Gateways[0].Zone == "west" && v.Gateways[0].Cell != v.Cell
	})
	if len(a.View(theImage).Members) != 1 {
		t.Errorf("a's cell has %d members", len(a.View(theImage).Members))
	}
	defer func() {
		a.Leave(theImage)
		eventually(t, "nobody has the whole image", func() bool { return s.metric(t, "shoal_supernode_holders") == 0 })
	}()
	if list := s.Members(); len(list) != 3 || list[0].Zone != "east" || list[2].Zone != "west" || list[2].Images != 1 {
		t.Errorf("members %+v", list)
	}
}

// Who has no token gets nothing but a no, and is disconnected.
func TestStranger(t *testing.T) {
	s := newSuper(t, nil)
	serveEcho(s.host)
	n := newNode(t, nil, s)
	serveEcho(n.host)
	ready(t, n, s)
	n.has(t, s, theImage)
	n.knows(t, theImage, n)
	if !canSpeak(n.host, s.host) {
		t.Error("a member gets no answer from the supernode")
	}
	h, err := host.New(host.Config{Key: newKey(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if canSpeak(h, s.host) {
		t.Error("a stranger gets an answer from the supernode")
	}
	if canSpeak(h, n.host) {
		t.Error("a stranger gets an answer from a node")
	}
	eventually(t, "the stranger is disconnected by the node", func() bool { return h.Network().Connectedness(n.id()) != network.Connected })
	eventually(t, "the stranger is disconnected by the supernode", func() bool { return h.Network().Connectedness(s.host.ID()) != network.Connected })
	if s.metric(t, "shoal_supernode_strangers_total") == 0 {
		t.Error("no stranger was counted")
	}
}

// A member may speak to a node that has an image of its own, also before the
// node's list has it; another member may not.
func TestNodeGuard(t *testing.T) {
	s := newSuper(t, nil)
	a, b, c := newNode(t, nil, s), newNode(t, nil, s), newNode(t, nil, s)
	for _, n := range []*aNode{a, b, c} {
		serveEcho(n.host)
		ready(t, n, s)
	}
	a.has(t, s, theImage)
	a.knows(t, theImage, a)
	b.has(t, s, theImage)
	b.knows(t, theImage, a, b) // a may not know b yet
	if !canSpeak(b.host, a.host) {
		t.Error("a member of the group gets no answer")
	}
	c.has(t, s, blockdev.Sum([]byte("another image")))
	h := c.host // c's own guard would not dial
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := host.New(host.Config{Key: c.key})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if canSpeak(raw, a.host) {
		t.Error("a member of another group gets an answer")
	}
}

func TestWrongToken(t *testing.T) {
	s := newSuper(t, nil)
	var token atomic.Pointer[string]
	set := func(v string) { token.Store(&v) }
	set(otherToken)
	n := newNode(t, func(c *members.Config) { c.Token = func() (string, error) { return *token.Load(), nil } }, s)
	err := n.Ready(t.Context(), s.host.ID())
	if !errors.Is(err, blockdev.ErrUnavailable) || !strings.Contains(err.Error(), "wrong token") {
		t.Fatalf("with another token: %v", err)
	}
	if got := s.metric(t, "shoal_supernode_joins_refused_total"); got < 1 {
		t.Errorf("%v refusals counted", got)
	}
	// The operator adds the token: the node gets in by itself.
	writeTokens(t, s.tokenFile, goodToken, otherToken)
	eventually(t, "the node gets in", func() bool { return n.Ready(t.Context(), s.host.ID()) == nil })
}

// A token file that cannot be read for a moment, as while it is being written, is no
// refusal: the node keeps what it knows, says what is wrong, and joins again as soon
// as the file is there.
func TestTokenFileAway(t *testing.T) {
	s := newSuper(t, nil)
	var away atomic.Bool
	n := newNode(t, func(c *members.Config) {
		c.Token = func() (string, error) {
			if away.Load() {
				return "", os.ErrNotExist
			}
			return goodToken, nil
		}
	}, s)
	other := newNode(t, nil, s)
	n.has(t, s, theImage)
	other.has(t, s, theImage)
	n.knows(t, theImage, n, other)
	away.Store(true)
	if err := n.host.Network().ClosePeer(s.host.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the node says that it has no token", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := n.Ready(ctx, s.host.ID())
		return errors.Is(err, blockdev.ErrUnavailable) && errors.Is(err, os.ErrNotExist)
	})
	if v := n.View(theImage); v == nil || len(v.Members) == 0 {
		t.Error("the node has forgotten who has the image")
	}
	away.Store(false)
	eventually(t, "the node gets in", func() bool { return n.Ready(t.Context(), s.host.ID()) == nil })
	n.knows(t, theImage, n, other)
}

// A token that is taken out of the file ends the memberships that it began; a node
// that has a newer one in its file goes on without a gap.
func TestRotation(t *testing.T) {
	s := newSuper(t, nil)
	var token atomic.Pointer[string]
	old, next := goodToken, otherToken
	token.Store(&old)
	a := newNode(t, func(c *members.Config) { c.Token = func() (string, error) { return *token.Load(), nil } }, s)
	b := newNode(t, nil, s)
	for _, n := range []*aNode{a, b} {
		ready(t, n, s)
		n.has(t, s, theImage)
	}
	a.knows(t, theImage, a, b)
	token.Store(&next)
	writeTokens(t, s.tokenFile, next)
	a.knows(t, theImage, a) // b is off the list when its lease is over
	if b.View(theImage) != nil {
		t.Error("b still has a view")
	}
	if err := b.Ready(t.Context(), s.host.ID()); err == nil || !strings.Contains(err.Error(), "token") {
		t.Errorf("b, with the old token: %v", err)
	}
	ready(t, a, s)
	// A file that says nothing changes nothing.
	writeTokens(t, s.tokenFile, "short")
	eventually(t, "the bad file is counted", func() bool { return s.metric(t, "shoal_supernode_token_file_errors_total") > 0 })
	ready(t, a, s)
}

func TestRevoke(t *testing.T) {
	dir := t.TempDir()
	key := newKey(t)
	s := newSuper(t, func(c *Config) { c.Dir, c.Key = dir, key })
	a, b := newNode(t, nil, s), newNode(t, nil, s)
	serveEcho(a.host)
	for _, n := range []*aNode{a, b} {
		ready(t, n, s)
		n.has(t, s, theImage)
	}
	a.knows(t, theImage, a, b)
	b.knows(t, theImage, a, b)
	if !canSpeak(b.host, a.host) {
		t.Fatal("a member of the group gets no answer")
	}
	if err := s.Revoke(b.id().String()); err != nil {
		t.Fatal(err)
	}
	a.knows(t, theImage, a)
	eventually(t, "a disconnects b", func() bool { return a.host.Network().Connectedness(b.id()) != network.Connected })
	err := b.Ready(t.Context(), s.host.ID())
	for err == nil {
		err = b.Ready(t.Context(), s.host.ID())
	}
	if !strings.Contains(err.Error(), "revoked") {
		t.Errorf("b is told: %v", err)
	}
	eventually(t, "b has no view", func() bool { return b.View(theImage) == nil })
	// It is kept.
	again, err := New(Config{Dir: dir, TokenFile: s.tokenFile, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if list := again.Members(); len(list) != 1 || !list[0].Revoked || list[0].ID != b.id().String() {
		t.Errorf("after a restart: %+v", list)
	}
	if err := s.Revoke("nonsense"); err == nil {
		t.Error("nonsense can be revoked")
	}
	if err := s.Allow(b.id().String()); err != nil {
		t.Fatal(err)
	}
	a.knows(t, theImage, a, b)
}

// A node that is gone without a word is off the lists after its lease, one that
// says goodbye at once.
func TestLease(t *testing.T) {
	s := newSuper(t, func(c *Config) { c.Lease = 2 * time.Second })
	a, b, c := newNode(t, nil, s), newNode(t, nil, s), newNode(t, nil, s)
	for _, n := range []*aNode{a, b, c} {
		ready(t, n, s)
		n.has(t, s, theImage)
	}
	a.knows(t, theImage, a, b, c)
	if err := b.host.Network().Close(); err != nil { // it can say nothing, and not come back
		t.Fatal(err)
	}
	eventually(t, "b is listed as lost", func() bool {
		for _, m := range s.Members() {
			if m.ID == b.id().String() {
				return m.Lost
			}
		}
		return false
	})
	a.knows(t, theImage, a, c)
	if s.metric(t, "shoal_supernode_leases_expired_total") != 1 {
		t.Error("the end of the lease was not counted")
	}
	if err := c.Node.Close(); err != nil {
		t.Fatal(err)
	}
	a.knows(t, theImage, a)
	if got := s.metric(t, "shoal_supernode_leases_expired_total"); got != 1 {
		t.Errorf("%v leases expired, the second node said goodbye", got)
	}
}

// Two machines with one identity: the second is told so, and the first goes on.
func TestSameIdentity(t *testing.T) {
	s := newSuper(t, nil)
	a := newNode(t, nil, s)
	ready(t, a, s)
	clone := nodeWith(t, a.key, nil, s)
	if err := clone.Ready(t.Context(), s.host.ID()); err == nil || !strings.Contains(err.Error(), "same identity") {
		t.Errorf("the clone is told: %v", err)
	}
	ready(t, a, s)
	// The first is stopped: the second takes over.
	a.stop(t)
	eventually(t, "the clone gets in", func() bool { return clone.Ready(t.Context(), s.host.ID()) == nil })
}

// A grant is for one node and one image, from a supernode that is trusted.
func TestGrants(t *testing.T) {
	s, other := newSuper(t, nil), newSuper(t, nil)
	a, b := newNode(t, nil, s), newNode(t, nil, s)
	ready(t, a, s)
	ready(t, b, s)
	a.has(t, s, theImage)
	a.knows(t, theImage, a)
	stolen, err := s.Grant(a.id().String(), theImage, registryHost)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := other.Grant(b.id().String(), theImage, registryHost)
	if err != nil {
		t.Fatal(err)
	}
	for name, grant := range map[string][]byte{"none": nil, "another node's": stolen, "another supernode's": elsewhere} {
		refused := s.metric(t, "shoal_supernode_groups_refused_total")
		b.Join(theImage, nil, grant)
		eventually(t, name+" is refused", func() bool { return s.metric(t, "shoal_supernode_groups_refused_total") > refused })
		if b.View(theImage) != nil {
			t.Errorf("with the grant %s b sees the group", name)
		}
		b.Leave(theImage)
	}
	b.has(t, s, theImage)
	b.knows(t, theImage, a, b)
}

// After a restart of the supernode the nodes come back, with their groups.
func TestSupernodeRestart(t *testing.T) {
	key := newKey(t)
	s := newSuper(t, func(c *Config) { c.Key = key })
	a, b := newNode(t, nil, s), newNode(t, nil, s)
	for _, n := range []*aNode{a, b} {
		ready(t, n, s)
		n.has(t, s, theImage)
	}
	a.knows(t, theImage, a, b)
	addr := s.host.Addrs()[0].String()
	port := addr[strings.LastIndex(addr, "/")+1:]
	if err := errors.Join(s.List.Close(), s.host.Close()); err != nil {
		t.Fatal(err)
	}
	if v := a.View(theImage); v == nil || len(v.Members) != 2 {
		t.Error("without the supernode a has forgotten the group")
	}
	l, err := New(Config{Dir: t.TempDir(), TokenFile: s.tokenFile, Key: key, Lease: testLease})
	if err != nil {
		t.Fatal(err)
	}
	h, err := host.New(host.Config{Key: key, Listen: []string{"127.0.0.1:" + port}, Guard: l})
	if err != nil {
		t.Fatal(err)
	}
	l.Start(h)
	defer func() {
		if err := errors.Join(l.Close(), h.Close()); err != nil {
			t.Error(err)
		}
	}()
	eventually(t, "both are back in the group", func() bool {
		list := l.Members()
		return len(list) == 2 && list[0].Images == 1 && list[1].Images == 1
	})
	a.knows(t, theImage, a, b)
}

// With two supernodes a group is kept by one, and by the other when that is gone.
func TestFailover(t *testing.T) {
	keys := []crypto.PrivKey{newKey(t), newKey(t)}
	var supers []*super
	for i := range keys {
		other, err := host.ID(keys[1-i])
		if err != nil {
			t.Fatal(err)
		}
		supers = append(supers, newSuper(t, func(c *Config) { c.Key, c.Siblings = keys[i], []peer.ID{other} }))
	}
	a, b := newNode(t, nil, supers...), newNode(t, nil, supers...)
	for _, n := range []*aNode{a, b} {
		ready(t, n, supers[0])
		ready(t, n, supers[1])
		n.has(t, supers[0], theImage) // also for the other, which is a sibling
	}
	a.knows(t, theImage, a, b)
	home := supers[0]
	if route.Order(theImage, []peer.ID{supers[0].host.ID(), supers[1].host.ID()})[0] != home.host.ID() {
		home = supers[1]
	}
	in := func(s *super) (n int) {
		for _, m := range s.Members() {
			n += m.Images
		}
		return n
	}
	eventually(t, "the group is at its home alone", func() bool { return in(supers[0])+in(supers[1]) == 2 && in(home) == 2 })
	other := supers[0]
	if other == home {
		other = supers[1]
	}
	if err := home.host.Network().Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the group has moved", func() bool { return in(other) == 2 })
	c := newNode(t, nil, supers...)
	c.has(t, other, theImage)
	a.knows(t, theImage, a, b, c)
}

// Without any supernode a list counts for a while, and then not.
func TestOutage(t *testing.T) {
	s := newSuper(t, nil)
	a := newNode(t, func(c *members.Config) { c.Outage = 2 * time.Second }, s)
	a.has(t, s, theImage)
	a.knows(t, theImage, a)
	if err := s.host.Network().Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a has lost the supernode", func() bool { return a.Ready(t.Context(), s.host.ID()) != nil })
	if a.View(theImage) == nil {
		t.Error("the view is gone at once")
	}
	eventually(t, "a has dropped the view", func() bool { return a.View(theImage) == nil })
}
