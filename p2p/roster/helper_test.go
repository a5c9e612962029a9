package roster

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
)

const (
	goodToken  = "a token of some length"
	otherToken = "another token of some length"
	testLease  = time.Second // the shortest there is

	registryHost = "registry.example"
)

func newKey(t testing.TB) crypto.PrivKey {
	t.Helper()
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// super is a supernode as far as membership goes.
type super struct {
	*List
	host      libp2phost.Host
	tokenFile string
	reg       *prometheus.Registry
}

func (s *super) info() peer.AddrInfo { return peer.AddrInfo{ID: s.host.ID(), Addrs: s.host.Addrs()} }

func writeTokens(t testing.TB, path string, tokens ...string) {
	t.Helper()
	var b []byte
	for _, s := range tokens {
		b = append(append(b, s...), '\n')
	}
	// Another file, as editors and configuration management do it.
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func newSuper(t testing.TB, change func(*Config)) *super {
	t.Helper()
	s := &super{tokenFile: filepath.Join(t.TempDir(), "tokens"), reg: prometheus.NewRegistry()}
	writeTokens(t, s.tokenFile, goodToken)
	c := Config{Dir: t.TempDir(), TokenFile: s.tokenFile, Key: newKey(t), Lease: testLease, Registerer: s.reg, Log: testLog(t, "super")}
	if change != nil {
		change(&c)
	}
	var err error
	if s.List, err = New(c); err != nil {
		t.Fatal(err)
	}
	if s.host, err = host.New(host.Config{Key: c.Key, Listen: []string{"127.0.0.1:0"}, Guard: s.List}); err != nil {
		t.Fatal(err)
	}
	s.Start(s.host)
	t.Cleanup(func() { s.stop(t) })
	return s
}

func (s *super) stop(t testing.TB) {
	if err := errors.Join(s.List.Close(), s.host.Close()); err != nil {
		t.Error(err)
	}
}

type logWriter struct {
	t    testing.TB
	name string
}

func (w logWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s: %s", w.name, b)
	return len(b), nil
}

func testLog(t testing.TB, name string) *slog.Logger {
	if _, bench := t.(*testing.B); bench {
		return nil
	}
	return slog.New(slog.NewTextHandler(logWriter{t, name}, nil))
}

// aNode is a node as far as membership goes.
type aNode struct {
	*members.Node
	host libp2phost.Host
	key  crypto.PrivKey
}

func newNode(t testing.TB, change func(*members.Config), supers ...*super) *aNode {
	t.Helper()
	return nodeWith(t, newKey(t), change, supers...)
}

func nodeWith(t testing.TB, key crypto.PrivKey, change func(*members.Config), supers ...*super) *aNode {
	t.Helper()
	c := members.Config{Token: func() (string, error) { return goodToken, nil }, Log: testLog(t, "node"), Failover: 100 * time.Millisecond}
	for _, s := range supers {
		c.Supernodes = append(c.Supernodes, s.info())
	}
	if change != nil {
		change(&c)
	}
	n := &aNode{key: key}
	var err error
	if n.Node, err = members.New(c); err != nil {
		t.Fatal(err)
	}
	if n.host, err = host.New(host.Config{Key: key, Listen: []string{"127.0.0.1:0"}, Guard: n.Node}); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(n.host); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.stop(t) })
	return n
}

func (n *aNode) stop(t testing.TB) {
	if err := errors.Join(n.Node.Close(), n.host.Close()); err != nil {
		t.Error(err)
	}
}

func (n *aNode) id() peer.ID { return n.host.ID() }

// has gives n an image by way of s.
func (n *aNode) has(t testing.TB, s *super, manifest blockdev.Digest) {
	t.Helper()
	grant, err := s.Grant(n.id().String(), manifest, registryHost)
	if err != nil {
		t.Fatal(err)
	}
	n.Join(manifest, []blockdev.Digest{manifest}, grant)
}

// knows waits until n's view of the group has these members and no others.
func (n *aNode) knows(t testing.TB, manifest blockdev.Digest, want ...*aNode) {
	t.Helper()
	eventually(t, "the view of the group", func() bool {
		v := n.View(manifest)
		if v == nil || len(v.Members) != len(want) {
			return false
		}
		ids := map[string]bool{}
		for _, m := range v.Members {
			ids[m.ID] = true
		}
		for _, w := range want {
			if !ids[string(w.id())] {
				return false
			}
		}
		return true
	})
}

// echo serves a protocol that says one byte to whoever may open it.
const echo = "/test/echo/1"

func serveEcho(h libp2phost.Host) {
	h.SetStreamHandler(echo, func(st network.Stream) {
		_, _ = st.Write([]byte{1})
		_ = st.Close()
	})
}

// canSpeak says whether from gets an answer of to's echo.
func canSpeak(from libp2phost.Host, to libp2phost.Host) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := from.Connect(ctx, peer.AddrInfo{ID: to.ID(), Addrs: to.Addrs()}); err != nil {
		return false
	}
	st, err := from.NewStream(ctx, to.ID(), echo)
	if err != nil {
		return false
	}
	defer func() { _ = st.Reset() }()
	_ = st.SetDeadline(time.Now().Add(5 * time.Second))
	n, _ := st.Read(make([]byte, 1))
	return n == 1
}

// eventually waits until ok, for as long as a loaded machine may need.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
		<-tick.C
	}
}

func (s *super) metric(t testing.TB, name string) float64 {
	t.Helper()
	families, err := s.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var sum float64
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}
