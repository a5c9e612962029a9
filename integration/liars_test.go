package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
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
	l.mu.Unlock()
	n := l.lengths[d]
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

// startLiar joins the supernode and the image's group.
func startLiar(t *testing.T, s *site, ref, lie string) *liar {
	ctx := t.Context()
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
	var im *blockdev.Image
	noError(t, lab.WaitFor(ctx, "the image's indexes", 20*time.Second, func() (err error) {
		im, err = client.OpenImage(ctx, blockdev.ImageRequest{Ref: ref})
		return err
	}))
	l := &liar{lie: lie, lengths: map[blockdev.Digest]uint32{}}
	diffs := map[blockdev.Digest]bool{}
	group := members.Image{Manifest: im.Manifest, Grant: im.Grant}
	for _, layer := range im.Layers {
		group.Diffs = append(group.Diffs, layer.DiffID)
		diffs[layer.DiffID] = true
		for _, c := range must(index.Decode(layer.Index))(t).Chunks {
			l.lengths[c.Digest] = c.Length
		}
	}
	server := must(exchange.NewServer(h, exchange.ServerConfig{Chunks: l}))(t)
	t.Cleanup(func() { noError(t, server.Close()) })
	node.Watch(func(d blockdev.Digest) bool { return diffs[d] })
	node.Join(group)
	noError(t, lab.WaitFor(ctx, "the liar in the group", 20*time.Second, func() error {
		n, err := s.supernode.Metric(ctx, "shoal_supernode_groups")
		if err == nil && n < 1 {
			err = fmt.Errorf("%v groups", n)
		}
		return err
	}))
	return l
}

// TestDrillLiars: a node fetches an image in a group with a peer that sends wrong
// bytes, short ones, slow ones, or none. Each read gets the right bytes, from the
// supernode, and in time.
func TestDrillLiars(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	lies := []string{"wrong", "short", "slow", "never"}
	n := rounds(t, len(lies))
	reads, failed, wrong, asked := 0, 0, 0, 0
	var longest time.Duration
	for i := range n {
		lie := lies[i%len(lies)]
		t.Run(fmt.Sprintf("%s-%d", lie, i), func(t *testing.T) {
			ctx := t.Context()
			im, want := pushContent(t, s.registry, fmt.Sprintf("app%d", i), uint64(9000+i))
			l := startLiar(t, s, im.Ref, lie)
			node := must(s.StartNode(ctx, fmt.Sprintf("node%d", i), s.supernode.Address, "read_timeout = \"20s\"\n"))(t)
			noError(t, node.Pull(ctx, im))
			dir := s.Path(fmt.Sprintf("view%d", i))
			// The node is to know the liar before it asks for anything.
			noError(t, lab.WaitFor(ctx, "the group", 20*time.Second, func() error {
				n, err := node.Metric(ctx, "shoal_node_group_members")
				if err == nil && n < 2 {
					err = fmt.Errorf("%v members", n)
				}
				return err
			}))
			unmount := must(node.Mount(ctx, im, "view", dir))(t)
			for path, data := range want {
				began := time.Now()
				got, err := os.ReadFile(filepath.Join(dir, path))
				longest = max(longest, time.Since(began))
				reads++
				switch {
				case err != nil:
					failed++
					t.Logf("%s: %v", path, err)
				case string(got) != data:
					wrong++
				}
			}
			noError(t, node.WaitLocal(ctx, im.Ref, time.Minute))
			noError(t, unmount())
			noError(t, node.Stop())
			l.mu.Lock()
			asked += l.asked
			l.mu.Unlock()
		})
	}
	t.Logf("%d files read, %d chunks asked of the liar, longest read %v", reads, asked, longest)
	if asked == 0 {
		t.Error("the liar was never asked: nothing was tested")
	}
	name := fmt.Sprintf("a peer answers wrong bytes, short, slow, never, %d rounds: ", n)
	count(t, name+"failed reads", failed)
	count(t, name+"wrong bytes", wrong)
	figure(t, name+"longest read of a file", "s", "", 0, longest.Seconds())
}
