package members

import (
	"bufio"
	"crypto/rand"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/wire"
)

// A supernode that says that it cannot answer now, as one does that is about to stop,
// refuses nobody: what the node knows goes on to count. A refusal ends that.
func TestUnavailableIsNoRefusal(t *testing.T) {
	key := func() crypto.PrivKey {
		k, _, err := crypto.GenerateEd25519Key(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	super, err := host.New(host.Config{Key: key(), Listen: []string{"127.0.0.1:0"}})
	if err != nil {
		t.Fatal(err)
	}
	defer super.Close()
	image := blockdev.Digest{7}
	self := member(1)
	var answer atomic.Pointer[error] // to each hello
	var hellos atomic.Int32
	super.SetStreamHandler(Protocol, func(st network.Stream) {
		defer func() { _ = st.Reset() }()
		r := bufio.NewReader(st)
		if _, err := wire.ReadFrame(r, wire.MaxMemberRequest, nil); err != nil {
			return
		}
		hellos.Add(1)
		say := func(ev *wire.MemberEvent) {
			if b, err := wire.AppendMessage(nil, ev); err == nil {
				_, _ = st.Write(b)
			}
		}
		if no := answer.Load(); no != nil {
			say(&wire.MemberEvent{Part: &wire.MemberEvent_Error{Error: wire.FromError(*no)}})
			_ = st.CloseWrite()
			_, _ = st.Read(make([]byte, 1))
			return
		}
		say(&wire.MemberEvent{Part: &wire.MemberEvent_Welcome{Welcome: &wire.Welcome{LeaseMs: 60_000}}})
		for { // until the node joins the group
			b, err := wire.ReadFrame(r, wire.MaxMemberRequest, nil)
			if err != nil {
				return
			}
			if req, err := wire.ParseMemberRequest(b); err == nil && req.GetJoin() != nil {
				say(&wire.MemberEvent{Part: &wire.MemberEvent_Update{Update: &wire.GroupUpdate{Group: image[:], Version: 1, Cell: 1, Joined: []*wire.GroupMember{self}}}})
			}
		}
	})
	n, err := New(Config{Supernodes: []peer.AddrInfo{{ID: super.ID(), Addrs: super.Addrs()}}, Token: func() (string, error) { return "a token of some length", nil }})
	if err != nil {
		t.Fatal(err)
	}
	h, err := host.New(host.Config{Key: key(), Guard: n})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(h); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(n.Close(), h.Close()); err != nil {
			t.Error(err)
		}
	}()
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not within 30 s: %s", what)
			}
		}
	}
	n.Join(image, nil, nil)
	until("a view", func() bool { return n.View(image) != nil })
	for _, c := range []struct {
		says error
		keep bool
	}{{blockdev.ErrUnavailable, true}, {wire.ErrBusy, true}, {blockdev.ErrUnauthorized, false}} {
		answer.Store(&c.says)
		asked := hellos.Load()
		if err := super.Network().ClosePeer(h.ID()); err != nil {
			t.Fatal(err)
		}
		if !c.keep {
			until("the view is dropped", func() bool { return n.View(image) == nil })
			continue
		}
		until("the node tries again and again", func() bool { return hellos.Load() >= asked+3 })
		if n.View(image) == nil {
			t.Fatalf("%v: the view is gone", c.says)
		}
		answer.Store(nil)
		if err := n.Ready(t.Context(), super.ID()); err != nil {
			t.Fatal(err)
		}
	}
}
