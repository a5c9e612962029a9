package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/roster"
	"github.com/shoalfs/shoal/p2p/wire"
)

// manyImages is how many images a node of a busy cluster has.
const manyImages = 100

// measureMembers measures what nodes cost a supernode: a real process, and nodes that are
// real as far as it sees them. Each has an identity, a connection and a membership of its
// own; what they are told of others they read and forget, so that one process can be a
// thousand.
func (z *sizing) measureMembers(ctx context.Context) (err error) {
	s, err := z.StartSupernode(ctx, "members", "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Stop()) }()
	if z.idle, err = settled(ctx, s); err != nil {
		return err
	}
	all, _, err := s.RSS()
	if err != nil {
		return err
	}
	z.add(rowIdle, float64(all))
	grant, err := z.granter("members")
	if err != nil {
		return err
	}
	crowd, err := z.connect(ctx, s)
	defer func() { err = errors.Join(err, crowd.close()) }()
	if err != nil {
		return err
	}
	say("connected")
	before, err := z.addNodes(ctx, rowConnected, s)
	if err != nil {
		return err
	}
	if err := crowd.join(ctx, grant, 0, 1); err != nil {
		return err
	}
	if _, err := z.addNodes(ctx, rowOneImage, s); err != nil {
		return err
	}
	if err := crowd.join(ctx, grant, 1, manyImages); err != nil {
		return err
	}
	say("joined")
	after, err := z.addNodes(ctx, rowImages, s)
	if err != nil {
		return err
	}
	say("a node's place in an image's group: %.0f bytes", (after-before)/float64(z.nodes*manyImages))
	return crowd.check()
}

// addNodes adds a row with what the supernode has taken for its nodes, and returns that.
func (z *sizing) addNodes(ctx context.Context, row string, s *lab.Supernode) (bytes float64, err error) {
	if bytes, err = settled(ctx, s); err == nil {
		bytes -= z.idle
		z.add(row, bytes/float64(z.nodes)*1000)
	}
	return bytes, err
}

// granter returns what makes grants as the supernode in a directory makes them, with its
// identity: so nodes join groups of images that need not exist.
func (z *sizing) granter(supernode string) (*roster.List, error) {
	key, err := host.LoadIdentity(z.Path(supernode, "identity"))
	if err != nil {
		return nil, err
	}
	dir := z.Path("granter")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	return roster.New(roster.Config{Dir: dir, Key: key})
}

// crowd are the nodes.
type crowd []*crowdNode

// connect has the nodes connect and join, some at a time.
func (z *sizing) connect(ctx context.Context, s *lab.Supernode) (crowd, error) {
	info, err := host.ParseAddr(s.Address)
	if err != nil {
		return nil, err
	}
	token, err := os.ReadFile(z.TokenFile())
	if err != nil {
		return nil, err
	}
	say("%d nodes connect", z.nodes)
	nodes := make(crowd, z.nodes)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range nodes {
		g.Go(func() (err error) {
			nodes[i], err = connectNode(gctx, info, strings.TrimSpace(string(token)), i)
			return err
		})
	}
	return nodes, g.Wait()
}

// join has all nodes join the groups of images from to to, one image after the other, and
// waits until all have been let in and told.
func (c crowd) join(ctx context.Context, grants *roster.List, from, to int) error {
	say("%d nodes have images %d to %d", len(c), from+1, to)
	for i := from; i < to; i++ {
		image := blockdev.Sum(fmt.Append(nil, "image ", i))
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(16)
		for _, n := range c {
			g.Go(func() error {
				grant, err := grants.Grant(n.host.ID().String(), image, "registry.example/app")
				if err != nil {
					return err
				}
				if err := n.send(&wire.MemberRequest{Part: &wire.MemberRequest_Join{Join: &wire.GroupJoin{Group: image[:], Grant: grant, Full: true}}}); err != nil {
					return err
				}
				return n.renew(gctx) // its answer comes after the join
			})
		}
		if err := g.Wait(); err != nil {
			return errors.Join(err, c.check())
		}
	}
	// Those who came last are told within a second, and what they are told is read.
	return sleep(ctx, 5*time.Second)
}

// check returns what has become of nodes that are no members any more.
func (c crowd) check() error {
	for _, n := range c {
		if n == nil {
			continue
		}
		n.mu.Lock()
		err := n.err
		n.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func (c crowd) close() error {
	var errs []error
	for _, n := range c {
		if n != nil {
			errs = append(errs, n.close())
		}
	}
	return errors.Join(errs...)
}

// crowdNode is a node as a supernode sees it.
type crowdNode struct {
	host    libp2phost.Host
	stream  network.Stream
	welcome chan struct{} // an answer to a renewal
	done    chan struct{} // closed by close
	wg      sync.WaitGroup

	writing sync.Mutex
	mu      sync.Mutex
	err     error // why it is no member any more
}

func connectNode(ctx context.Context, info peer.AddrInfo, token string, i int) (_ *crowdNode, err error) {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return nil, err
	}
	h, err := host.New(host.Config{Key: key, MaxPeers: 4})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	if err := h.Connect(ctx, info); err != nil {
		return nil, err
	}
	st, err := h.NewStream(ctx, info.ID, members.Protocol)
	if err != nil {
		return nil, err
	}
	n := &crowdNode{host: h, stream: st, welcome: make(chan struct{}, 16), done: make(chan struct{})}
	instance := make([]byte, wire.InstanceLen)
	if _, err := rand.Read(instance); err != nil {
		return nil, err
	}
	addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 7703)
	hello := &wire.Hello{Token: token, Instance: instance, Zone: fmt.Sprint("zone-", i%2), Rack: fmt.Sprint("rack-", i/40),
		Addrs: [][]byte{wire.AppendAddr(nil, addr)}}
	if err := n.send(&wire.MemberRequest{Part: &wire.MemberRequest_Hello{Hello: hello}}); err != nil {
		return nil, err
	}
	n.wg.Go(n.read)
	if err := n.answered(ctx); err != nil {
		return nil, err
	}
	n.wg.Go(n.keep)
	return n, nil
}

func (n *crowdNode) send(m *wire.MemberRequest) error {
	b, err := wire.AppendMessage(nil, m)
	if err != nil {
		return err
	}
	n.writing.Lock()
	defer n.writing.Unlock()
	_, err = n.stream.Write(b)
	return err
}

// renew renews the lease, and returns when the supernode has answered.
func (n *crowdNode) renew(ctx context.Context) error {
	if err := n.send(&wire.MemberRequest{Part: &wire.MemberRequest_Renew{Renew: &wire.Renew{}}}); err != nil {
		return err
	}
	return n.answered(ctx)
}

func (n *crowdNode) answered(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	select {
	case <-n.welcome:
		return nil
	case <-ctx.Done():
		n.mu.Lock()
		defer n.mu.Unlock()
		return errors.Join(fmt.Errorf("node %s: no answer of the supernode: %w", n.host.ID(), ctx.Err()), n.err)
	}
}

// keep renews the lease, as nodes do.
func (n *crowdNode) keep() {
	t := time.NewTicker(4 * time.Second)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if err := n.send(&wire.MemberRequest{Part: &wire.MemberRequest_Renew{Renew: &wire.Renew{}}}); err != nil {
				n.fail(err)
				return
			}
		case <-n.done:
			return
		}
	}
}

// read reads what the supernode says.
func (n *crowdNode) read() {
	r := bufio.NewReader(n.stream)
	var buf []byte
	for {
		var err error
		if buf, err = wire.ReadFrame(r, wire.MaxMemberEvent, buf); err != nil {
			n.fail(err)
			return
		}
		ev, err := wire.ParseMemberEvent(buf)
		if err != nil {
			n.fail(err)
			return
		}
		switch p := ev.Part.(type) {
		case *wire.MemberEvent_Welcome:
			select {
			case n.welcome <- struct{}{}:
			default: // of a renewal that nobody waits for
			}
		case *wire.MemberEvent_Error:
			n.fail(p.Error.Err())
		case *wire.MemberEvent_Refusal:
			n.fail(p.Refusal.Error.Err())
		}
	}
}

func (n *crowdNode) fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err == nil {
		n.err = fmt.Errorf("node %s: %w", n.host.ID(), err)
	}
}

func (n *crowdNode) close() error {
	close(n.done)
	_ = n.stream.Reset()
	n.wg.Wait()
	return n.host.Close()
}
