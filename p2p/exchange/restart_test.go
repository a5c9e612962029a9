package exchange

import (
	"context"
	"crypto/rand"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/chain"
	"github.com/shoalfs/shoal/internal/image"
)

// lastSource counts what is asked of a registry, which has nothing.
type lastSource struct{ asked atomic.Int64 }

func (l *lastSource) Fetch(context.Context, blockdev.Request, blockdev.Deliver) error {
	l.asked.Add(1)
	return blockdev.ErrNotFound
}

// TestRestartAsksNoRegistry: reads that come while a server is being restarted, and refuses
// connections, get their bytes from it when it is back.
func TestRestartAsksNoRegistry(t *testing.T) {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	st, chunks := newStore(t, false, text(1, 1000), text(2, 1000))
	server := newHost(t, key, "127.0.0.1:0")
	newServer(t, server, ServerConfig{Chunks: st})
	const patience = 20 * time.Second
	c, err := NewClient(newHost(t, nil), peer.AddrInfo{ID: server.ID(), Addrs: server.Addrs()},
		Options{Restart: time.Second, Away: patience})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	registry := new(lastSource)
	sources := chain.New(chain.Step{Name: "supernode", Source: c, Patience: patience, Away: func() bool { return c.Gone() > patience }},
		chain.Step{Name: "registry", Source: registry})
	if err := sources.Fetch(t.Context(), request(blockdev.Demand, chunks[:1]), discard); err != nil {
		t.Fatal(err)
	}
	addr, err := manet.ToNetAddr(server.Addrs()[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the end of the connection", func() bool { return c.Gone() > 0 })
	read := make(chan error, 2)
	for _, prio := range []blockdev.Priority{blockdev.Demand, blockdev.Startup} {
		go func() { read <- sources.Fetch(t.Context(), request(prio, chunks[1:]), discard) }()
	}
	select {
	case err := <-read:
		t.Errorf("a read ended with the server gone: %v", err)
	case <-time.After(1500 * time.Millisecond): // longer than Restart
	}
	again := newHost(t, key, addr.String())
	newServer(t, again, ServerConfig{Chunks: st})
	for range 2 {
		if err := <-read; err != nil {
			t.Error(err)
		}
	}
	if n := registry.asked.Load(); n != 0 {
		t.Errorf("the registry was asked %d times", n)
	}
}

// TestGoneForLong: requests for chunks of a server that has been gone for long fail at once,
// and do not wait for an attempt to connect that is under way.
func TestGoneForLong(t *testing.T) {
	_, chunks := newStore(t, false, text(1, 1000))
	k := &keeper{ctx: t.Context(), since: time.Now().Add(-time.Minute), dialing: make(chan struct{}), host: newHost(t, nil)}
	c := &Client{keeper: k, opts: Options{Away: 10 * time.Second, Restart: time.Second}}
	k.opts = &c.opts
	c.demand = newLane(k.host, "nobody", ChunkProtocol, 1)
	c.window, c.starting = NewLinkWindow(), NewLinkWindow()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := c.Fetch(ctx, request(blockdev.Demand, chunks), discard); err == nil || ctx.Err() != nil {
		t.Errorf("%v; waited for an attempt to connect: %v", err, ctx.Err())
	}
}

// TestFirstSign: a server that is at work on an image or a document says so soon, and one
// that is silent is given up sooner than one that has said something.
func TestFirstSign(t *testing.T) {
	h := newHost(t, nil, loopback)
	var release chan struct{}
	wait := func(ctx context.Context) error {
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	newServer(t, h, ServerConfig{
		Images: imagesFunc(func(ctx context.Context, _ string, _ image.Request) (*image.Image, error) {
			return testImage(), wait(ctx)
		}),
		Documents: documentsFunc(func(ctx context.Context, _ string, _ image.DocumentRequest) (*image.Document, error) {
			return newDocument(1), wait(ctx)
		}),
	})
	c := newClient(t, h, Options{})
	ask := map[string]func(*Client, func()) error{
		"image": func(c *Client, alive func()) error {
			req := testRequest()
			req.Alive = alive
			_, err := c.FetchIndexes(t.Context(), req)
			return err
		},
		"document": func(c *Client, alive func()) error {
			_, err := c.Document(t.Context(), image.DocumentRequest{Ref: "docker.io/library/redis:7", Alive: alive})
			return err
		},
	}
	for name, do := range ask {
		release = make(chan struct{})
		if err := do(c, sync.OnceFunc(func() { close(release) })); err != nil { // or it waits for ever
			t.Errorf("%s: %v", name, err)
		}
	}
	mute := newHost(t, nil, loopback)
	for _, p := range []protocol.ID{ImageProtocol, DocumentProtocol} {
		mute.SetStreamHandler(p, func(network.Stream) {})
	}
	c = newClient(t, mute, Options{FirstSign: 100 * time.Millisecond, ImageTimeout: time.Hour})
	for name, do := range ask {
		if err := do(c, nil); !errors.Is(err, blockdev.ErrUnavailable) {
			t.Errorf("%s of a server that says nothing: %v", name, err)
		}
	}
}
