package integration

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	pb "google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/wire"
)

// client is a node that keeps to no rules: a host without guard, and messages
// written by hand.
type client struct {
	libp2phost.Host
	id peer.ID
}

func newClient(t *testing.T) *client {
	t.Helper()
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	noError(t, err)
	h := must(host.New(host.Config{Key: key}))(t)
	t.Cleanup(func() { _ = h.Close() })
	return &client{h, h.ID()}
}

// open opens a stream at a peer, on a connection that it makes if there is none.
func (c *client) open(ctx context.Context, to peer.AddrInfo, proto string) (network.Stream, error) {
	if err := c.Connect(ctx, to); err != nil {
		return nil, err
	}
	return c.NewStream(ctx, to.ID, protocol.ID(proto))
}

// ask sends one message and returns the first one of the answer.
func (c *client) ask(t *testing.T, to peer.AddrInfo, proto string, m pb.Message) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	st, err := c.open(ctx, to, proto)
	if err != nil {
		return nil, err
	}
	defer func() { _ = st.Reset() }()
	noError(t, st.SetDeadline(time.Now().Add(10*time.Second)))
	b := must(wire.AppendMessage(nil, m))(t)
	if _, err := st.Write(b); err != nil {
		return nil, err
	}
	return wire.ReadFrame(bufio.NewReader(st), wire.MaxMemberEvent, nil)
}

// hello asks to be let in.
func (c *client) hello(t *testing.T, to peer.AddrInfo, token string) (*wire.MemberEvent, error) {
	t.Helper()
	b, err := c.ask(t, to, members.Protocol, &wire.MemberRequest{Part: &wire.MemberRequest_Hello{Hello: &wire.Hello{
		Token: token, Instance: make([]byte, wire.InstanceLen),
	}}})
	if err != nil {
		return nil, err
	}
	return wire.ParseMemberEvent(b)
}

// TestNoToken: who has no valid token gets no index, no list of members and no
// chunk, from nobody, though it knows what to ask for.
func TestNoToken(t *testing.T) {
	s := newSite(t, "")
	ctx := t.Context()
	ref := s.push(t, "app", layer(t, file("f", bigContent(1))))
	im := must(s.registry.Image(ctx, "app", "v1"))(t)
	noError(t, s.node.Pull(ctx, im))
	super := must(host.ParseAddr(s.supernode.Address))(t)
	node := nodeAddr(t, s.node)
	diff := must(blockdev.ParseDigest(im.Layers[0].DiffID))(t)
	chunk := aChunk(t, s.node, diff)

	get := func(c *client, to peer.AddrInfo) map[string]error {
		index := must(wire.NewImageRequest(&image.Request{Ref: ref}))(t)
		_, indexErr := c.ask(t, to, exchange.ImageProtocol, index)
		_, chunkErr := c.ask(t, to, exchange.ChunkProtocol, &wire.ChunkRequest{Diff: diff[:], Digests: chunk[:]})
		group := must(blockdev.ParseDigest(im.Manifest.String()))(t)
		b, listErr := c.ask(t, to, members.Protocol, &wire.MemberRequest{Part: &wire.MemberRequest_Join{
			Join: &wire.GroupJoin{Group: group[:]},
		}})
		if listErr == nil {
			listErr = must(wire.ParseMemberEvent(b))(t).GetError().Err()
		}
		return map[string]error{"index": indexErr, "chunk": chunkErr, "list": listErr}
	}
	for name, token := range map[string]string{"no hello": "", "wrong token": "not the lab's own token"} {
		c := newClient(t)
		if token != "" {
			ev, err := c.hello(t, super, token)
			if err == nil && ev.GetError() == nil {
				t.Fatalf("%s: let in: %v", name, ev)
			}
		}
		for what, err := range get(c, super) {
			if err == nil {
				t.Errorf("%s: the supernode gives the %s", name, what)
			}
		}
		for what, err := range get(c, node) {
			if err == nil {
				t.Errorf("%s: the node gives the %s", name, what)
			}
		}
	}
	// Said for operators, and counted.
	if line := logLine(t, s.supernode.Log, "wrong token"); line == "" {
		t.Error("the supernode's log says nothing of a wrong token")
	}
	if n := must(s.supernode.Metric(ctx, "shoal_supernode_joins_refused_total"))(t); n < 1 {
		t.Errorf("%v refusals counted", n)
	}
	// With the token the same client gets in, and may not see a group without a grant.
	c := newClient(t)
	if ev, err := c.hello(t, super, "the lab's own token"); err != nil || ev.GetWelcome() == nil {
		t.Fatalf("with the token: %v, %v", ev, err)
	}
}

// nodeAddr finds where a node listens.
func nodeAddr(t *testing.T, n *lab.Node) peer.AddrInfo {
	t.Helper()
	key := must(host.LoadIdentity(filepath.Join(n.Root, "identity")))(t)
	id := must(host.ID(key))(t)
	return must(host.ParseAddr(id.String() + "@" + n.Listen))(t)
}

// aChunk is the digest of a chunk of a diff on the node.
func aChunk(t *testing.T, n *lab.Node, diff blockdev.Digest) blockdev.Digest {
	t.Helper()
	files := must(filepath.Glob(filepath.Join(n.Root, "diffs", "*", "index")))(t)
	for _, f := range files {
		ix := must(index.Decode(must(os.ReadFile(f))(t)))(t)
		if ix.DiffID == diff {
			return ix.Chunks[0].Digest
		}
	}
	t.Fatalf("no index of %s on the node", diff)
	return blockdev.Digest{}
}

// TestRotateAndRevoke: tokens are exchanged while nodes run, and a node is thrown
// out by hand.
func TestRotateAndRevoke(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	tokens, mine := l.Path("tokens"), l.Path("mine")
	write := func(path string, lines ...string) {
		noError(t, os.WriteFile(path+".new", []byte(strings.Join(lines, "\n")+"\n"), 0o600))
		noError(t, os.Rename(path+".new", path))
	}
	const first, second = "the first token of all", "the token after that"
	write(tokens, first)
	write(mine, first)
	super := must(l.StartSupernode(ctx, "super", fmt.Sprintf("token_file = %q\n", tokens)))(t)
	node := must(l.StartNode(ctx, "node", super.Address, fmt.Sprintf("token_file = %q\n", mine)))(t)
	joined := func(want float64) {
		t.Helper()
		noError(t, lab.WaitFor(ctx, "membership", 40*time.Second, func() error {
			n, err := node.Metric(ctx, "shoal_node_supernodes")
			if err == nil && n != want {
				err = fmt.Errorf("it is a member of %v supernodes, want %v", n, want)
			}
			return err
		}))
	}
	joined(1)
	// Old and new, then the node's, then the new one alone.
	write(tokens, first, second)
	write(mine, second)
	write(tokens, second)
	noError(t, lab.WaitFor(ctx, "the node joins with the second token", 40*time.Second, func() error {
		n, err := super.Metric(ctx, "shoal_supernode_joins_total")
		if err == nil && n < 2 {
			err = errors.New("it has joined once")
		}
		return err
	}))
	joined(1)

	out := must(l.Run(ctx, "shoal", "members", "--control", super.Control))(t)
	id := nodeAddr(t, node).ID.String()
	if !strings.Contains(out, id) {
		t.Fatalf("shoal members does not list %s:\n%s", id, out)
	}
	must(l.Run(ctx, "shoal", "members", "revoke", "--control", super.Control, id))(t)
	joined(0)
	if line := logLine(t, node.Log, "revoked"); line == "" {
		t.Error("the node's log does not say that it is revoked")
	}
	if out := must(l.Run(ctx, "shoal", "members", "--control", super.Control))(t); !strings.Contains(out, "revoked") {
		t.Errorf("shoal members does not say so:\n%s", out)
	}
	must(l.Run(ctx, "shoal", "members", "allow", "--control", super.Control, id))(t)
	joined(1)
	if _, err := l.Run(ctx, "shoal", "members", "--control", node.Control); err == nil || !strings.Contains(err.Error(), "this is a node") {
		t.Errorf("shoal members at a node: %v", err)
	}
}

// TestTwoSupernodes: one of two is killed, and the registry sends nothing twice.
func TestTwoSupernodes(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	reg := must(l.StartRegistry(ctx, "registry", l.Path("images"), ""))(t)
	var layers []lab.Blob
	for i := range 6 {
		layers = append(layers, layer(t, file(fmt.Sprintf("f%d", i), bigContent(10+i))))
	}
	must(reg.Push(ctx, "app", "v1", []string{"/bin/true"}, layers...))(t)
	im := must(reg.Image(ctx, "app", "v1"))(t)

	supers := must(l.StartSupernodes(ctx, "super", 2, ""))(t)
	node := func(name string) *lab.Node {
		return must(l.StartNode(ctx, name, supers[0].Address+","+supers[1].Address, ""))(t)
	}
	fetched := func() (sum float64) {
		for _, s := range supers {
			if s.Alive() == nil {
				sum += must(s.Metric(ctx, "shoal_supernode_registry_bytes_total"))(t)
			}
		}
		return sum
	}
	a := node("a")
	noError(t, a.Pull(ctx, im))
	// Each layer is on both: fetched by its owner, copied by the other.
	noError(t, lab.WaitFor(ctx, "copies", 30*time.Second, func() error {
		var stored float64
		for _, s := range supers {
			stored += must(s.Metric(ctx, "shoal_supernode_store_layers"))(t)
		}
		if stored != 12 {
			return fmt.Errorf("%v layers are stored, want 12", stored)
		}
		return nil
	}))
	if got, size := fetched(), float64(im.Compressed()); got > 1.05*size+64<<10 {
		t.Errorf("the registry has sent %.0f bytes for an image of %.0f", got, size)
	}
	before := make([]float64, 2)
	for i, s := range supers {
		before[i] = must(s.Metric(ctx, "shoal_supernode_registry_bytes_total"))(t)
	}
	b := node("b")
	// A container starts on a, which makes it fetch all; and then on b.
	mount := func(n *lab.Node) {
		dir := l.Path("view-" + n.Name)
		unmount := must(n.Mount(ctx, im, "view", dir))(t)
		t.Cleanup(func() {
			if err := unmount(); err != nil {
				t.Error(err)
			}
		})
	}
	mount(a)
	noError(t, supers[0].Kill())
	noError(t, a.WaitLocal(ctx, im.Ref, 60*time.Second))
	noError(t, b.Pull(ctx, im))
	mount(b)
	noError(t, b.WaitLocal(ctx, im.Ref, 60*time.Second))
	for i := range 6 {
		got := string(must(os.ReadFile(filepath.Join(l.Path("view-b"), fmt.Sprintf("f%d", i))))(t))
		if got != bigContent(10+i) {
			t.Errorf("f%d has other content than was pushed", i)
		}
	}
	after := must(supers[1].Metric(ctx, "shoal_supernode_registry_bytes_total"))(t)
	if more := after - before[1]; more > 0.05*float64(im.Compressed())+64<<10 {
		t.Errorf("after one was killed the registry has sent %.0f bytes more, of an image of %d", more, im.Compressed())
	}
}
