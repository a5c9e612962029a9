package exchange

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/shoalfs/shoal/blockdev"
)

// slowLook is a host on which the first to see that there is no connection is held up
// before he goes on, as the scheduler may do at any time.
type slowLook struct {
	libp2phost.Host
	hold atomic.Bool
	held chan struct{} // closed: somebody is held up
	free chan struct{} // closed: he goes on
}

func (h *slowLook) Network() network.Network { return &slowNetwork{h.Host.Network(), h} }

type slowNetwork struct {
	network.Network
	h *slowLook
}

func (n *slowNetwork) Connectedness(p peer.ID) network.Connectedness {
	c := n.Network.Connectedness(p)
	if c != network.Connected && n.h.hold.CompareAndSwap(true, false) {
		close(n.h.held)
		<-n.h.free
	}
	return c
}

// TestLateReport: who has seen that the connection is gone and says so when there is a new
// one does not make requests wait for an attempt to dial that nobody makes.
func TestLateReport(t *testing.T) {
	st, chunks := newStore(t, false, text(1, 1000))
	server := newHost(t, nil, "127.0.0.1:0")
	newServer(t, server, ServerConfig{Chunks: st})
	h := &slowLook{Host: newHost(t, nil), held: make(chan struct{}), free: make(chan struct{})}
	c, err := NewClient(h, peer.AddrInfo{ID: server.ID(), Addrs: []ma.Multiaddr{server.Addrs()[0]}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fetch := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		return c.Fetch(ctx, request(blockdev.Demand, chunks), discard)
	}
	if err := fetch(); err != nil {
		t.Fatal(err)
	}
	h.hold.Store(true)
	if err := h.Host.Network().ClosePeer(server.ID()); err != nil {
		t.Fatal(err)
	}
	<-h.held          // whom libp2p has told
	c.keeper.report() // whose request has failed
	connection := func() bool {
		c.keeper.mu.Lock()
		defer c.keeper.mu.Unlock()
		return c.keeper.up && h.Host.Network().Connectedness(server.ID()) == network.Connected
	}
	waitFor(t, "a new connection", connection)
	close(h.free)
	for range 100 { // before, while and after the late report comes
		if err := fetch(); err != nil {
			t.Fatalf("a read on a good connection: %v", err)
		}
	}
}

// TestKeeperHurries: who waits for a server does not wait for a long back-off, and does
// not have a server that is down dialed all the time either.
func TestKeeperHurries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &keeper{ctx: t.Context(), wanted: make(chan struct{}, 1)}
		rest := func(backoff, asked time.Duration) time.Duration {
			began := time.Now()
			if asked >= 0 {
				time.AfterFunc(asked, k.hurry)
			}
			if !k.rest(backoff) {
				t.Fatal("rest ended before its time")
			}
			return time.Since(began)
		}
		for _, c := range []struct {
			name           string
			backoff, asked time.Duration
			least, most    time.Duration
			waits          bool
		}{
			{"nobody waits", time.Hour, -1, time.Hour / 2, time.Hour, false},
			{"somebody waits", time.Hour, 0, hurried / 2, hurried, true},
			{"somebody comes late", time.Hour, time.Minute, time.Minute, time.Minute, true},
			{"a short back-off", minBackoff, 0, minBackoff / 2, minBackoff, true},
		} {
			k.dialing = nil
			if took := rest(c.backoff, c.asked); took < c.least || took > c.most {
				t.Errorf("%s: the next attempt comes after %v, want %v to %v", c.name, took, c.least, c.most)
			}
			if waits := k.dialing != nil; waits != c.waits {
				t.Errorf("%s: ready waits for the next attempt: %v", c.name, waits)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		k.ctx = ctx
		time.AfterFunc(time.Second, cancel)
		if k.rest(time.Hour) {
			t.Error("rest outlives its keeper")
		}
		k.up = true
		k.hurry()
		if len(k.wanted) != 0 {
			t.Error("a keeper that is connected is told to hurry")
		}
	})
}

// TestOneOfManyIsNotWaitedFor: of one of many peers the first attempt to connect is waited
// for, and none after one that has failed, until there is a connection.
func TestOneOfManyIsNotWaitedFor(t *testing.T) {
	h := newHost(t, nil)
	for _, many := range []bool{false, true} {
		k := &keeper{host: h, ctx: t.Context(), opts: &Options{Peer: many, Log: slog.New(slog.DiscardHandler)}, dialing: make(chan struct{})}
		k.info.ID = "nobody"
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if err := k.ready(ended); !errors.Is(err, context.Canceled) {
			t.Errorf("one of many %v: the first attempt is not waited for: %v", many, err)
		}
		k.settle(errTest)
		k.begin()
		if err := k.ready(ended); errors.Is(err, errTest) != many {
			t.Errorf("one of many %v, after an attempt that has failed: %v", many, err)
		}
		k.settle(nil)
		k.begin()
		if err := k.ready(ended); !errors.Is(err, context.Canceled) {
			t.Errorf("one of many %v: the first attempt after a connection is not waited for: %v", many, err)
		}
	}
}

var errTest = errors.New("refused")
