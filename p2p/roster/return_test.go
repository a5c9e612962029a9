package roster

import (
	"bufio"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/wire"
)

// A node that loses its connection and comes back within its lease keeps its places:
// others hear nothing of it, and it is told that all is as it was.
func TestReturn(t *testing.T) {
	s := newSuper(t, func(c *Config) { c.Lease = 30 * time.Second })
	nodes := []*aNode{newNode(t, nil, s), newNode(t, nil, s), newNode(t, nil, s)}
	a, b := nodes[0], nodes[1]
	for _, n := range nodes {
		ready(t, n, s)
		n.has(t, s, theImage)
	}
	for _, n := range nodes {
		n.knows(t, theImage, nodes...)
	}
	const messages, bytes = "shoal_supernode_group_updates_total", "shoal_supernode_group_update_bytes_total"
	version, sent, size := b.View(theImage).Version, s.metric(t, messages), s.metric(t, bytes)
	if err := a.host.Network().ClosePeer(s.host.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a has come back and was told", func() bool {
		return s.metric(t, "shoal_supernode_joins_total") == 4 && s.metric(t, messages) > sent
	})
	a.knows(t, theImage, nodes...)
	if sent, size = s.metric(t, messages)-sent, s.metric(t, bytes)-size; sent != 1 || size > 70 {
		t.Errorf("that took %v messages with %v bytes", sent, size)
	}
	if v := b.View(theImage).Version; v != version {
		t.Errorf("another node's view has version %d, it had %d", v, version)
	}
	// What changes afterwards, it hears as before.
	c := newNode(t, nil, s)
	c.has(t, s, theImage)
	a.knows(t, theImage, append(nodes, c)...)
}

// After a restart of the supernode, which remembers nothing, the nodes come back and
// are told that all is as it was.
func TestRestartIsNoHerd(t *testing.T) {
	key := newKey(t)
	s := newSuper(t, func(c *Config) { c.Key, c.Lease = key, 30*time.Second })
	var nodes []*aNode
	for range 6 {
		n := newNode(t, func(c *members.Config) { c.Outage = time.Hour }, s)
		ready(t, n, s)
		n.has(t, s, theImage)
		nodes = append(nodes, n)
	}
	for _, n := range nodes {
		n.knows(t, theImage, nodes...)
	}
	const messages, bytes = "shoal_supernode_group_updates_total", "shoal_supernode_group_update_bytes_total"
	whole := s.metric(t, bytes)
	addr := s.host.Addrs()[0].String()
	port := addr[strings.LastIndex(addr, "/")+1:]
	if err := errors.Join(s.List.Close(), s.host.Close()); err != nil {
		t.Fatal(err)
	}
	again := &super{tokenFile: s.tokenFile, reg: s.reg}
	var err error
	if again.List, err = New(Config{Dir: t.TempDir(), TokenFile: s.tokenFile, Key: key, Lease: 30 * time.Second, Registerer: s.reg}); err != nil {
		t.Fatal(err)
	}
	if again.host, err = host.New(host.Config{Key: key, Listen: []string{"127.0.0.1:" + port}, Guard: again.List}); err != nil {
		t.Fatal(err)
	}
	again.Start(again.host)
	defer again.stop(t)
	eventually(t, "all were told", func() bool { return again.metric(t, messages) >= float64(len(nodes)) })
	for _, n := range nodes {
		n.knows(t, theImage, nodes...)
	}
	size := again.metric(t, bytes)
	t.Logf("%v bytes when they joined, %v after the restart", whole, size)
	if size > 100*float64(len(nodes)) {
		t.Errorf("%v bytes for %d nodes", size, len(nodes))
	}
	// And they go on from there.
	nodes[0].Leave(theImage)
	nodes[1].knows(t, theImage, nodes[1:]...)
}

// talk is a node that speaks the membership protocol as the test says.
type talk struct {
	t  *testing.T
	st network.Stream
	r  *bufio.Reader
}

func (c *talk) say(m *wire.MemberRequest) {
	c.t.Helper()
	b, err := wire.AppendMessage(nil, m)
	if err == nil {
		_, err = c.st.Write(b)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *talk) hear() *wire.MemberEvent {
	c.t.Helper()
	b, err := wire.ReadFrame(c.r, wire.MaxMemberEvent, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	ev, err := wire.ParseMemberEvent(b)
	if err != nil {
		c.t.Fatal(err)
	}
	return ev
}

// A node of an earlier version says nothing about what it has: it is told everything,
// in words that it knows. A place that a node does not take again within its lease is
// given up.
func TestReturnOfEarlierVersion(t *testing.T) {
	s := newSuper(t, func(c *Config) { c.Lease = 2 * time.Second })
	other := newNode(t, nil, s)
	ready(t, other, s)
	other.has(t, s, theImage)
	h, err := host.New(host.Config{Key: newKey(t), Listen: []string{"127.0.0.1:0"}})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	second := blockdev.Sum([]byte("an image that is removed meanwhile"))
	dial := func() *talk {
		if err := h.Connect(t.Context(), s.info()); err != nil {
			t.Fatal(err)
		}
		st, err := h.NewStream(t.Context(), s.host.ID(), members.Protocol)
		if err != nil {
			t.Fatal(err)
		}
		c := &talk{t, st, bufio.NewReader(st)}
		c.say(&wire.MemberRequest{Part: &wire.MemberRequest_Hello{Hello: &wire.Hello{Token: goodToken, Instance: make([]byte, wire.InstanceLen)}}})
		if c.hear().GetWelcome() == nil {
			t.Fatal("not welcome")
		}
		return c
	}
	join := func(c *talk, manifest blockdev.Digest) *wire.GroupUpdate {
		grant, err := s.Grant(h.ID().String(), manifest, registryHost)
		if err != nil {
			t.Fatal(err)
		}
		c.say(&wire.MemberRequest{Part: &wire.MemberRequest_Join{Join: &wire.GroupJoin{Group: manifest[:], Grant: grant}}})
		u := c.hear().GetUpdate()
		if u == nil || u.From != 0 || blockdev.Digest(u.Group) != manifest || u.KeepCells || u.KeepMembers {
			t.Fatalf("it is told %v", u)
		}
		return u
	}
	c := dial()
	join(c, second)
	if u := join(c, theImage); len(u.Joined) != 2 {
		t.Errorf("%d members", len(u.Joined))
	}
	if err := c.st.Reset(); err != nil {
		t.Fatal(err)
	}
	c = dial()
	if u := join(c, theImage); len(u.Joined) != 2 {
		t.Errorf("after it has come back: %d members", len(u.Joined))
	}
	images := func() int {
		for _, m := range s.Members() {
			if m.ID == h.ID().String() {
				return m.Images
			}
		}
		return 0
	}
	if n := images(); n != 2 {
		t.Errorf("it has places in %d groups", n)
	}
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	eventually(t, "the place that it has not taken again is given up", func() bool {
		select {
		case <-tick.C: // each request renews its lease
			c.say(&wire.MemberRequest{Part: &wire.MemberRequest_Renew{Renew: &wire.Renew{}}})
		default:
		}
		return images() == 1
	})
}
