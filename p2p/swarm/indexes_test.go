package swarm

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
)

// relayAt is how the supernode names a host.
func relayAt(t *testing.T, h libp2phost.Host) image.Relay {
	t.Helper()
	key, ok := host.Key(h.ID())
	if !ok {
		t.Fatal("no Ed25519 key")
	}
	a, err := manet.ToNetAddr(h.Addrs()[0])
	if err != nil {
		t.Fatal(err)
	}
	return image.Relay{Key: key, Addrs: []netip.AddrPort{netip.MustParseAddrPort(a.String())}}
}

func (w *world) open(ctx context.Context, n *node) (*image.Image, error) {
	return n.swarm.FetchIndexes(ctx, image.Request{Ref: "registry.example/app:v1", Relay: true})
}

// imagesFunc is an exchange.Images made of a function.
type imagesFunc func(context.Context, string, image.Request) (*image.Image, error)

func (f imagesFunc) FetchIndexesFor(ctx context.Context, from string, req image.Request) (*image.Image, error) {
	return f(ctx, from, req)
}

// An index comes from a relay; and where that does not give it, from the next one, or
// from the supernode.
func TestIndexFromRelay(t *testing.T) {
	w := newWorld(t, 1<<20)
	a, b := w.node(options{}), w.node(options{})
	check := func(what string, given int64) {
		t.Helper()
		w.given.Store(0)
		img, err := w.open(t.Context(), b)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if len(img.Layers) != 1 || !bytes.Equal(img.Layers[0].Index, w.enc) {
			t.Errorf("%s: not the index", what)
		}
		if n := w.given.Load(); n != given {
			t.Errorf("%s: the supernode gave %d indexes, not %d", what, n, given)
		}
	}
	check("no relay", 1)
	w.relays = []image.Relay{relayAt(t, a.host)}
	check("a relay", 0)
	if got := b.metric(t, "shoal_node_relayed_index_bytes_total", ""); got != float64(len(w.enc)) {
		t.Errorf("%v bytes from a relay are counted, not %d", got, len(w.enc))
	}

	dead := newHost(t)
	gone := relayAt(t, dead)
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	silent := w.impostor(nil)
	silent.SetStreamHandler(exchange.ImageProtocol, func(st network.Stream) { _ = st.Reset() })
	liar := w.impostor(nil)
	server, err := exchange.NewServer(liar, exchange.ServerConfig{Images: imagesFunc(func(_ context.Context, _ string, req image.Request) (*image.Image, error) {
		return &image.Image{Ref: req.Ref, Layers: []image.Layer{{DiffID: req.Only[0], Index: append(bytes.Clone(w.enc[1:]), 0)}}}, nil
	})})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	w.relays = []image.Relay{gone, relayAt(t, liar)}
	check("a dead relay and one that lies", 1)
	w.relays = []image.Relay{relayAt(t, silent), relayAt(t, a.host)}
	check("one that hangs up, and one that gives it", 0)

	// If nobody gives it, the node is not left in the group.
	entered := w.entered.Load()
	w.relays = []image.Relay{gone}
	w.named = func() { w.down.Store(true) }
	if _, err := w.open(t.Context(), b); !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("a dead relay and a dead supernode: %v", err)
	}
	if n := w.entered.Load(); n != entered {
		t.Errorf("entered %d groups more than it left", n-entered)
	}
}

// Relays that lie as slowly as they may cost a few seconds each, and the time for the
// bytes once, however many they are.
func TestSlowRelays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		relays := make([]peer.AddrInfo, 3)
		began, asked := time.Now(), 0
		err := inTurn(t.Context(), relays, 12<<20, func(ctx context.Context, _ peer.AddrInfo) error {
			asked++
			<-ctx.Done()
			return ctx.Err()
		})
		if d := time.Since(began); !errors.Is(err, context.DeadlineExceeded) || d != 3*relayTime+12*time.Second {
			t.Errorf("%v after %v", err, d)
		}
		if asked != 3 {
			t.Errorf("%d relays were asked", asked)
		}
		// One that fails at once takes nothing from the next.
		asked = 0
		err = inTurn(t.Context(), relays, 12<<20, func(ctx context.Context, _ peer.AddrInfo) error {
			if asked++; asked == 1 {
				return blockdev.ErrCorrupt
			}
			select {
			case <-time.After(16 * time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		if err != nil || asked != 2 {
			t.Errorf("%v from relay %d", err, asked)
		}
	})
}

// Who asks for an index that is on its way gets it when it comes; it is kept for a
// while, and no more of them than there is room for.
func TestOpened(t *testing.T) {
	o := opened{m: map[blockdev.Digest]*opening{}}
	diff := func(i byte) blockdev.Digest { return blockdev.Digest{i} }
	img := &image.Image{Layers: []image.Layer{{DiffID: diff(1), IndexSize: 3}, {DiffID: diff(2), Index: []byte{2}}, {DiffID: diff(3)}, {DiffID: diff(4), IndexSize: 1}}}
	own := o.begin(img)
	if len(own) != 3 || len(o.begin(img)) != 0 {
		t.Fatalf("%d indexes are on their way", len(own))
	}
	got := make(chan []byte, 1)
	go func() {
		b, err := o.get(t.Context(), diff(1))
		if err != nil {
			t.Error(err)
		}
		got <- b
	}()
	select {
	case b := <-got:
		t.Errorf("came before it was there: %v", b)
	case <-time.After(20 * time.Millisecond):
	}
	o.set(own, diff(1), []byte("abc"))
	if b := <-got; string(b) != "abc" {
		t.Errorf("got %q", b)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := o.get(ctx, diff(2)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("what does not come: %v", err)
	}
	o.set(own, diff(4), make([]byte, maxOpened)) // no room
	o.end(own)
	for i := byte(2); i <= 4; i++ {
		if b, err := o.get(t.Context(), diff(i)); b != nil || err != nil {
			t.Errorf("diff %d: %d bytes, %v", i, len(b), err)
		}
	}
	if b, err := o.get(t.Context(), diff(1)); string(b) != "abc" || err != nil {
		t.Errorf("kept: %q, %v", b, err)
	}
}
