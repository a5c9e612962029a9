package host

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/libp2p/go-libp2p/core/crypto"
	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newHost(t *testing.T, c Config) libp2phost.Host {
	t.Helper()
	if c.Key == nil {
		key, _, err := crypto.GenerateEd25519Key(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c.Key = key
	}
	h, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func TestConnect(t *testing.T) {
	ctx := context.Background()
	server := newHost(t, Config{Listen: []string{"127.0.0.1:0"}, Registerer: prometheus.NewRegistry()})
	client := newHost(t, Config{UserAgent: "shoal/test"})
	lines := Addrs(server)
	if len(lines) != 1 {
		t.Fatalf("addresses %q", lines)
	}
	info, err := ParseAddr(lines[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Connect(ctx, info); err != nil {
		t.Fatal(err)
	}
	conns := client.Network().ConnsToPeer(server.ID())
	if len(conns) != 1 {
		t.Fatalf("%d connections", len(conns))
	}
	st := conns[0].ConnState()
	if st.Security != "/tls/1.0.0" || st.StreamMultiplexer != "/yamux/1.0.0" || st.Transport != "tcp" || !st.UsedEarlyMuxerNegotiation {
		t.Errorf("connection is %+v", st)
	}
	// What is not needed is not offered.
	for _, p := range server.Mux().Protocols() {
		if !strings.HasPrefix(string(p), "/ipfs/id/") {
			t.Errorf("protocol %s is offered", p)
		}
	}
	if len(Addrs(client)) != 0 {
		t.Errorf("a host that does not listen has addresses %q", Addrs(client))
	}
}

// Somebody else at the address of a supernode is not taken for it.
func TestWrongIdentity(t *testing.T) {
	server := newHost(t, Config{Listen: []string{"127.0.0.1:0"}})
	other := newHost(t, Config{})
	client := newHost(t, Config{})
	if err := client.Connect(context.Background(), peer.AddrInfo{ID: other.ID(), Addrs: server.Addrs()}); err == nil {
		t.Fatal("connected to a peer with another identity")
	}
}

func TestListen(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, listen := range map[string][]string{
		"one of two is taken": {"127.0.0.1:0", l.Addr().String()},
		"a name":              {"localhost:7411"},
		"no port":             {"127.0.0.1"},
		"port too large":      {"127.0.0.1:70000"},
	} {
		if h, err := New(Config{Key: key, Listen: listen}); err == nil {
			t.Errorf("%s: no error", name)
			_ = h.Close()
		}
	}
	for name, c := range map[string]Config{"peers": {Key: key, MaxPeers: -1}, "window": {Key: key, StreamWindow: 1}} {
		if h, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
			_ = h.Close()
		}
	}
	if _, err := New(Config{}); err == nil {
		t.Error("a host without identity")
	}
	all := newHost(t, Config{Listen: []string{":0"}})
	if len(Addrs(all)) == 0 {
		t.Error("listening on all addresses gives none to connect to")
	}
	for _, line := range Addrs(all) {
		if strings.Contains(line, "0.0.0.0") || strings.Contains(line, "[::]") {
			t.Errorf("%s is no address to connect to", line)
		}
	}
}

func TestParseAddr(t *testing.T) {
	const id = "12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5"
	for in, want := range map[string]string{
		id + "@192.0.2.1:7411":        "/ip4/192.0.2.1/tcp/7411",
		id + "@[2001:db8::1]:7411":    "/ip6/2001:db8::1/tcp/7411",
		id + "@super-1.example:1":     "/dns/super-1.example/tcp/1",
		id + "@[::ffff:192.0.2.1]:80": "/ip4/192.0.2.1/tcp/80",
	} {
		got, err := ParseAddr(in)
		if err != nil || got.ID.String() != id || len(got.Addrs) != 1 || got.Addrs[0].String() != want {
			t.Errorf("%s: %v, %v", in, got, err)
			continue
		}
		if back, err := FormatAddr(got.ID, got.Addrs[0]); err != nil {
			t.Errorf("%s: %v", in, err)
		} else if again, err := ParseAddr(back); err != nil || again.String() != got.String() {
			t.Errorf("%s formatted as %s, read as %v, %v", in, back, again, err)
		}
	}
	for _, in := range []string{
		"", "192.0.2.1:7411", id, id + "@", id + "@host", id + "@host:0", id + "@host:99999", id + "@:7411", "x@host:1", "@host:1",
		"/ip4/192.0.2.1/tcp/7411/p2p/" + id, id + "@host/../:1", id + "@[fe80::1%eth0]:1", id + "@" + strings.Repeat("a", 300) + ":1",
	} {
		if got, err := ParseAddr(in); err == nil {
			t.Errorf("%q accepted as %v", in, got)
		} else if !strings.Contains(err.Error(), "ID@host:port") {
			t.Errorf("%q: the error does not say what the form is: %v", in, err)
		}
	}
}

func TestIdentityFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "identity")
	// Several processes that start at once agree on one.
	ids := make([]peer.ID, 8)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			key, err := LoadIdentity(path)
			if err != nil {
				t.Error(err)
				return
			}
			ids[i], _ = ID(key)
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] || id == "" {
			t.Fatalf("identities differ: %v", ids)
		}
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", st.Mode(), err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := LoadIdentity(filepath.Join(t.TempDir(), "no", "dir")); err == nil {
		t.Error("no error without the directory")
	}
}

func TestIdentityFileDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "identity")
	if _, err := LoadIdentity(path); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const rsa = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VuBCIEIHcHbQpzGKV9PBbBclGyZkXfTC+H68CZKrF3+6UduSwq\n-----END PRIVATE KEY-----\n" // an X25519 key
	for name, b := range map[string][]byte{
		"empty": {}, "cut": good[:len(good)/2], "garbage": []byte("hello"), "another kind": []byte(rsa),
		"something behind": append(append([]byte{}, good...), "more"...), "huge": make([]byte, 1<<20),
	} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadIdentity(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
		if now, _ := os.ReadFile(path); string(now) != string(b) {
			t.Errorf("%s: the damaged file was changed", name)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadIdentity(path); err == nil || !strings.Contains(err.Error(), "0640") {
		t.Errorf("readable by others: %v", err)
	}
}

// A rack of 1,000 nodes behind one address connects at once, and each opens
// streams; one peer alone has a limit.
func TestLimits(t *testing.T) {
	rm, err := resourceManager(DefaultMaxPeers, DefaultStreamWindow, false)
	if err != nil {
		t.Fatal(err)
	}
	defer rm.Close()
	peers := make([]peer.ID, 1000)
	conns := make([]network.ConnManagementScope, len(peers))
	for i := range peers {
		_, pub, err := crypto.GenerateEd25519Key(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if peers[i], err = peer.IDFromPublicKey(pub); err != nil {
			t.Fatal(err)
		}
		addr := ma.StringCast(fmt.Sprintf("/ip4/192.0.2.1/tcp/%d", 1000+i))
		if conns[i], err = rm.OpenConnection(network.DirInbound, true, addr); err != nil {
			t.Fatalf("connection %d from one address: %v", i, err)
		}
	}
	for i, c := range conns {
		if err := c.SetPeer(peers[i]); err != nil {
			t.Fatalf("peer %d: %v", i, err)
		}
	}
	open := func(p peer.ID) error {
		s, err := rm.OpenStream(p, network.DirInbound)
		if err != nil {
			return err
		}
		return errors.Join(s.SetProtocol("/shoal/chunk/1"), s.ReserveMemory(minStreamWindow, network.ReservationPriorityAlways))
	}
	for i, p := range peers {
		for range 8 {
			if err := open(p); err != nil {
				t.Fatalf("stream of peer %d: %v", i, err)
			}
		}
	}
	n := 8
	for ; n <= streamsPerPeer && open(peers[0]) == nil; n++ {
	}
	if n != streamsPerPeer {
		t.Errorf("one peer may open %d streams, not %d", n, streamsPerPeer)
	}
	if err := open(peers[1]); err != nil {
		t.Errorf("one greedy peer shuts others out: %v", err)
	}
}

func TestMetricsOnlyWhereAsked(t *testing.T) {
	count := func(g prometheus.Gatherer) (n int) {
		families, err := g.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if strings.HasPrefix(f.GetName(), "libp2p_") {
				n++
			}
		}
		return n
	}
	newHost(t, Config{})
	if n := count(prometheus.DefaultGatherer); n > 0 {
		t.Errorf("%d metrics of libp2p in the default registry", n)
	}
	reg := prometheus.NewRegistry()
	newHost(t, Config{Registerer: reg, Listen: []string{"127.0.0.1:0"}})
	if count(reg) == 0 {
		t.Error("no metrics of libp2p in the registry that was given")
	}
}
