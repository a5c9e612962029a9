package uplink

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/wire"
)

// server is a real supernode's exchange, with room for one question of each node. A
// question for what hangs is answered when the test says so.
type server struct {
	*exchange.Client // the node's
	metrics          *prometheus.Registry
	began            chan string // references of what hangs
	answer           chan struct{}

	mu    sync.Mutex
	asked map[string]int
}

func (s *server) DocumentFor(ctx context.Context, _ string, req image.DocumentRequest) (*image.Document, error) {
	s.mu.Lock()
	s.asked[req.Ref]++
	s.mu.Unlock()
	if req.Credential.Username == "hangs" {
		s.began <- req.Ref
		select {
		case <-s.answer:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	b := []byte(req.Ref)
	return &image.Document{Digest: blockdev.Sum(b), MediaType: "m", Size: int64(len(b)), Data: b}, nil
}

// count says how often the server was asked for a document.
func (s *server) count(ref string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked[ref]
}

// busy counts the questions that the server had no room for.
func (s *server) busy(t *testing.T) (n float64) {
	t.Helper()
	families, err := s.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if f.GetName() == "shoal_p2p_requests_total" && l.GetValue() == "busy" {
					n += m.GetCounter().GetValue()
				}
			}
		}
	}
	return n
}

func newHost(t *testing.T, listen ...string) libp2phost.Host {
	t.Helper()
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	h, err := host.New(host.Config{Key: key, Listen: listen})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

// newServers returns an Uplink to n servers.
func newServers(t *testing.T, n int) (*Uplink, map[Supernode]*server) {
	t.Helper()
	node := newHost(t)
	nodes, servers := map[peer.ID]Supernode{}, map[Supernode]*server{}
	for range n {
		h := newHost(t, "127.0.0.1:0")
		s := &server{metrics: prometheus.NewRegistry(), began: make(chan string, 1), answer: make(chan struct{}), asked: map[string]int{}}
		x, err := exchange.NewServer(h, exchange.ServerConfig{Documents: s, Limits: exchange.Limits{DocumentsPerPeer: 1, FirstSign: 10 * time.Millisecond}, Registerer: s.metrics})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = x.Close() })
		// As a node makes them.
		s.Client, err = exchange.NewClient(node, peer.AddrInfo{ID: h.ID(), Addrs: h.Addrs()}, exchange.Options{Patient: true, Only: func() bool { return n == 1 }})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		nodes[h.ID()], servers[s.Client] = s.Client, s
	}
	u, err := New(nodes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	return u, servers
}

// refs returns n references of documents that belong to a supernode.
func (u *Uplink) refs(s Supernode, n int) (refs []string) {
	for i := 0; len(refs) < n; i++ {
		if ref := fmt.Sprintf("r.io/a:%d", i); u.order(imageKey(ref, blockdev.Digest{}), 0)[0] == s {
			refs = append(refs, ref)
		}
	}
	return refs
}

// document asks for a document, in the background.
func document(ctx context.Context, u *Uplink, ref, user string) <-chan error {
	done := make(chan error, 1)
	go func() {
		doc, err := u.Document(ctx, image.DocumentRequest{Ref: ref, Credential: image.Credential{Username: user}})
		if err == nil && string(doc.Data) != ref {
			err = fmt.Errorf("the document of %q came", doc.Data)
		}
		done <- err
	}()
	return done
}

// until waits until ok, which a question that has ended cannot bring about any more.
func until(t *testing.T, question <-chan error, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for !ok() {
		select {
		case err := <-question:
			t.Fatalf("all are busy, and the question ends: %v", err)
		case <-deadline:
			t.Fatal("all are busy, and are not asked again")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// TestBusyForDocument: if the supernode that a document belongs to is busy, then the next
// one is asked at once; if all are, then they are asked again until one has room.
func TestBusyForDocument(t *testing.T) {
	ctx := t.Context()
	u, servers := newServers(t, 2)
	var owner, next *server
	for _, s := range servers {
		owner, next = s, owner
	}
	mine, other := u.refs(owner.Client, 4), u.refs(next.Client, 1)
	first := document(ctx, u, mine[0], "hangs")
	if ref := <-owner.began; ref != mine[0] {
		t.Fatalf("%s is asked for first", ref)
	}
	if err := <-document(ctx, u, mine[1], ""); err != nil {
		t.Errorf("the owner is busy, and the next one is not: %v", err)
	}
	if a, b := owner.count(mine[1]), next.count(mine[1]); a != 0 || b != 1 || owner.busy(t) != 1 {
		t.Errorf("the owner works on it %d times, having said busy %v times; the next one %d times", a, owner.busy(t), b)
	}
	second := document(ctx, u, other[0], "hangs")
	<-next.began
	third := document(ctx, u, mine[2], "")
	until(t, third, func() bool { return owner.busy(t) >= 3 && next.busy(t) >= 2 })
	close(owner.answer)
	close(next.answer)
	for _, done := range []<-chan error{first, second, third} {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if err := <-document(ctx, u, mine[3], ""); err != nil || owner.count(mine[3]) != 1 {
		t.Errorf("the owner has room again: %v, asked %d times", err, owner.count(mine[3]))
	}
}

// TestOnlyOneAndBusy: a node that has one supernode asks that again while it is busy, for
// as long as the caller waits, and says that it was.
func TestOnlyOneAndBusy(t *testing.T) {
	u, servers := newServers(t, 1)
	for _, s := range servers {
		first := document(t.Context(), u, "r.io/a:1", "hangs")
		<-s.began
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		second := document(ctx, u, "r.io/a:2", "")
		until(t, second, func() bool { return s.busy(t) >= 2 })
		cancel()
		if err := <-second; !errors.Is(err, context.Canceled) || !errors.Is(err, wire.ErrBusy) {
			t.Errorf("%v, want the context's error and that the supernode was busy", err)
		}
		said := s.busy(t)
		third := document(t.Context(), u, "r.io/a:3", "")
		until(t, third, func() bool { return s.busy(t) >= said+2 })
		close(s.answer)
		for _, done := range []<-chan error{first, third} {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
}
