package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/roster"
)

// liar is a member that has all of an image, says so, and answers requests for its
// chunks in one wrong way or another.
type liar struct {
	lie     string
	lengths map[blockdev.Digest]uint32

	mu    sync.Mutex
	asked int
}

// Chunk implements exchange.Chunks.
func (l *liar) Chunk(ctx context.Context, d blockdev.Digest) (exchange.Encoded, error) {
	l.mu.Lock()
	l.asked++
	n := l.lengths[d]
	l.mu.Unlock()
	if n == 0 {
		return exchange.Encoded{}, blockdev.ErrNotFound
	}
	switch l.lie {
	case "short":
		n = (n + 1) / 2
	case "slow":
		select {
		case <-time.After(2 * time.Second):
		case <-ctx.Done():
			return exchange.Encoded{}, context.Cause(ctx)
		}
	case "never":
		<-ctx.Done()
		return exchange.Encoded{}, context.Cause(ctx)
	}
	return exchange.Encoded{Data: bytes.Repeat([]byte{0xa5}, int(n)), Length: n}, nil
}

// member makes a host of this process that has joined the supernode, and a client.
func member(t *testing.T, s *site) (*members.Node, libp2phost.Host, *exchange.Client) {
	super := must(host.ParseAddr(s.supernode.Address))(t)
	token := func() (string, error) {
		list, err := members.ReadTokens(s.TokenFile())
		if err != nil {
			return "", err
		}
		return list[0], nil
	}
	node := must(members.New(members.Config{Supernodes: []peer.AddrInfo{super}, Token: token}))(t)
	key := must(host.LoadIdentity(filepath.Join(t.TempDir(), "identity")))(t)
	addr := must(lab.FreeAddr())(t)
	h := must(host.New(host.Config{Key: key, Listen: []string{addr}, Guard: node}))(t)
	t.Cleanup(func() {
		noError(t, node.Close())
		noError(t, h.Close())
	})
	noError(t, node.Start(h))
	client := must(exchange.NewClient(h, super, exchange.Options{}))(t)
	t.Cleanup(func() { noError(t, client.Close()) })
	return node, h, client
}

// learn notes the lengths of an image's chunks.
func (l *liar) learn(im *image.Image) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, layer := range im.Layers {
		if layer.Index == nil {
			continue
		}
		ix, err := index.Decode(layer.Index)
		if err != nil {
			return err
		}
		for _, c := range ix.Chunks {
			l.lengths[c.Digest] = c.Length
		}
	}
	return nil
}

// startLiar joins the supernode and the image's group.
func startLiar(t *testing.T, s *site, ref, lie string) *liar {
	ctx := t.Context()
	node, h, client := member(t, s)
	var im *image.Image
	noError(t, lab.WaitFor(ctx, "the image's indexes", 20*time.Second, func() (err error) {
		im, err = client.FetchIndexes(ctx, image.Request{Ref: ref})
		return err
	}))
	l := &liar{lie: lie, lengths: map[blockdev.Digest]uint32{}}
	noError(t, l.learn(im))
	var diffs []blockdev.Digest
	for _, layer := range im.Layers {
		diffs = append(diffs, layer.DiffID)
	}
	server := must(exchange.NewServer(h, exchange.ServerConfig{Chunks: l}))(t)
	t.Cleanup(func() { noError(t, server.Close()) })
	node.Watch(func(d blockdev.Digest) bool { return slices.Contains(diffs, d) })
	node.Join(im.Manifest, diffs, im.Grant)
	noError(t, lab.WaitFor(ctx, "the liar in the group", 20*time.Second, func() error {
		n, err := s.supernode.Metric(ctx, "shoal_supernode_groups")
		if err == nil && n < 1 {
			err = fmt.Errorf("%v groups", n)
		}
		return err
	}))
	return l
}

// lyingSupernode has a true one's indexes and gives other chunks.
type lyingSupernode struct {
	*liar
	client *exchange.Client
	list   *roster.List
	origin string
}

// FetchIndexesFor implements exchange.Images.
func (l *lyingSupernode) FetchIndexesFor(ctx context.Context, peer string, req image.Request) (*image.Image, error) {
	im, err := l.client.FetchIndexes(ctx, req)
	if err == nil {
		err = l.learn(im)
	}
	if err == nil {
		im.Grant, err = l.list.Grant(peer, im.Manifest, l.origin)
	}
	return im, err
}

// startLyingSupernode returns the liar and what a node's config names.
func startLyingSupernode(t *testing.T, s *site, lie string) (*liar, string) {
	_, _, client := member(t, s)
	l := &liar{lie: lie, lengths: map[blockdev.Digest]uint32{}}
	dir := t.TempDir()
	key := must(host.LoadIdentity(filepath.Join(dir, "identity")))(t)
	list := must(roster.New(roster.Config{Dir: dir, TokenFile: s.TokenFile(), Key: key}))(t)
	addr := must(lab.FreeAddr())(t)
	h := must(host.New(host.Config{Key: key, Listen: []string{addr}, Guard: list}))(t)
	list.Start(h)
	server := must(exchange.NewServer(h, exchange.ServerConfig{Chunks: l, Images: &lyingSupernode{l, client, list, s.registry.Addr}}))(t)
	t.Cleanup(func() {
		noError(t, server.Close())
		noError(t, list.Close())
		noError(t, h.Close())
	})
	return l, must(host.ID(key))(t).String() + "@" + addr
}

// TestDrillLiars: a node fetches images from a supernode, or in a group with a peer,
// that sends wrong bytes, short ones, slow ones, or none. Each read gets the right
// bytes from elsewhere (the true supernode, or the registry), and in time.
func TestDrillLiars(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	lies := []string{"wrong", "short", "slow", "never"}
	n := min(rounds(t, 2*len(lies)), 10*len(lies))
	d := &lieCount{}
	for i := range n {
		lie, super := lies[i%len(lies)], i/len(lies)%2 == 1
		t.Run(fmt.Sprintf("%s, supernode %v, round %d", lie, super, i), func(t *testing.T) { d.round(t, s, i, lie, super) })
	}
	t.Logf("%d files read, %d chunks asked of the liars, longest read %v", d.reads, d.asked, d.longest)
	if d.asked == 0 {
		t.Error("no liar was ever asked: nothing was tested")
	}
	name := fmt.Sprintf("supernode or peer answers wrong bytes, short, slow, never, %d rounds: ", n)
	count(t, name+"failed reads", d.failed)
	count(t, name+"wrong bytes", d.wrong)
	figure(t, name+"longest read of a file", "s", "", 0, d.longest.Seconds())
}

// lieCount is what came of the rounds.
type lieCount struct {
	reads, failed, wrong, asked int
	longest                     time.Duration
}

func (d *lieCount) round(t *testing.T, s *site, i int, lie string, super bool) {
	ctx := t.Context()
	im, want := pushContent(t, s.registry, fmt.Sprintf("app%d", i), uint64(9000+i))
	var l *liar
	address := s.supernode.Address
	if super {
		l, address = startLyingSupernode(t, s, lie)
	} else {
		l = startLiar(t, s, im.Ref, lie)
	}
	node := must(s.StartNode(ctx, fmt.Sprintf("node%d", i), address, "read_timeout = \"10s\"\n"))(t)
	noError(t, lab.WaitFor(ctx, "pull", 20*time.Second, func() error { return node.Pull(ctx, im) }))
	dir := s.Path(fmt.Sprintf("view%d", i))
	if !super {
		// The node is to know the liar before it asks for anything.
		noError(t, lab.WaitFor(ctx, "the group", 20*time.Second, func() error {
			n, err := node.Metric(ctx, "shoal_node_group_members")
			if err == nil && n < 2 {
				err = fmt.Errorf("%v members", n)
			}
			return err
		}))
	}
	unmount := must(node.Mount(ctx, im, "view", dir))(t)
	for path, data := range want {
		began := time.Now()
		got, err := os.ReadFile(filepath.Join(dir, path))
		d.longest = max(d.longest, time.Since(began))
		d.reads++
		switch {
		case err != nil:
			d.failed++
			t.Logf("%s: %v", path, err)
		case string(got) != data:
			d.wrong++
		}
	}
	noError(t, unmount())
	noError(t, node.Stop())
	l.mu.Lock()
	d.asked += l.asked
	l.mu.Unlock()
}
