package swarm

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/route"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var theGroup = blockdev.Sum([]byte("manifest"))

// world is some nodes of one group, and a supernode that has everything.
type world struct {
	image.DocumentSource // not asked
	blockdev.ProfileSink // not told

	t     testing.TB
	ix    *blockdev.Index
	data  []byte
	enc   []byte
	mem   blockdevtest.Memory
	sent  atomic.Int64 // bytes from the supernode
	down  atomic.Bool  // the supernode fails
	nodes []*node

	relays  []image.Relay // whom the supernode names
	named   func()        // if not nil, called when it does
	given   atomic.Int64  // images whose indexes it gave
	entered atomic.Int64

	mu    sync.Mutex
	view  *route.View
	addrs map[peer.ID]peer.AddrInfo
	bar   map[peer.ID]bool // not in the group
}

func newWorld(t testing.TB, size int) *world {
	ix, data := blockdevtest.Diff(7, size)
	return newWorldOf(t, ix, data)
}

// newWorldOf is newWorld with a diff of the caller's.
func newWorldOf(t testing.TB, ix *blockdev.Index, data []byte) *world {
	w := &world{t: t, ix: ix, data: data, addrs: map[peer.ID]peer.AddrInfo{}, bar: map[peer.ID]bool{}, view: &route.View{Group: theGroup, Version: 1}}
	w.mem.PutDiff(w.ix, w.data)
	var err error
	if w.enc, err = index.Encode(w.ix); err != nil {
		t.Fatal(err)
	}
	return w
}

// Fetch is the supernode.
func (w *world) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	if w.down.Load() {
		return fmt.Errorf("supernode: %w", blockdev.ErrUnavailable)
	}
	return w.mem.Fetch(ctx, req, func(i int, data []byte) error {
		w.sent.Add(int64(len(data)))
		return deliver(i, data)
	})
}

// FetchIndexes is the supernode, too. It names relays to whom it may.
func (w *world) FetchIndexes(_ context.Context, req image.Request) (*image.Image, error) {
	if w.down.Load() {
		return nil, fmt.Errorf("supernode: %w", blockdev.ErrUnavailable)
	}
	l := image.Layer{DiffID: w.ix.DiffID, Index: w.enc}
	img := &image.Image{Ref: req.Ref, Manifest: theGroup}
	if req.Relay && len(w.relays) > 0 {
		img.Relays = w.relays
		l.IndexSize, l.IndexDigest, l.Index = int64(len(w.enc)), blockdev.Sum(w.enc), nil
		if w.named != nil {
			w.named()
		}
	} else {
		w.given.Add(1)
	}
	img.Layers = []image.Layer{l}
	return img, nil
}

// enter is Config.Enter. Everybody is in the group already.
func (w *world) enter(*image.Image, []peer.AddrInfo) func() {
	w.entered.Add(1)
	return func() { w.entered.Add(-1) }
}

// Groups, View, Addrs and Allowed are what a node knows of its groups.
func (w *world) Groups(diff blockdev.Digest) []blockdev.Digest {
	if diff != w.ix.DiffID {
		return nil
	}
	return []blockdev.Digest{theGroup}
}

func (w *world) View(blockdev.Digest) *route.View {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.view
}

// Changed is never closed: who waits for a first view in these tests has one.
func (w *world) Changed() <-chan struct{} { return nil }

func (w *world) Addrs(id peer.ID) (peer.AddrInfo, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	a, ok := w.addrs[id]
	return a, ok
}

func (w *world) Allowed(_ context.Context, group blockdev.Digest, id peer.ID) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.addrs[id]; !ok || group != theGroup || w.bar[id] {
		return blockdev.ErrUnauthorized
	}
	return nil
}

// join adds a peer to the view.
func (w *world) join(h libp2phost.Host, zone string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := *w.view
	v.Version++
	m := route.Member{ID: string(h.ID()), Zone: zone}
	if zone == "" {
		v.Members = append(append([]route.Member(nil), v.Members...), m)
	} else {
		v.Gateways = append(append([]route.Member(nil), v.Gateways...), m)
	}
	w.view = &v
	w.addrs[h.ID()] = peer.AddrInfo{ID: h.ID(), Addrs: h.Addrs()}
}

// node is a node as cmd/shoal/internal/node puts it together.
type node struct {
	host   libp2phost.Host
	swarm  *Swarm
	cache  *cache.Cache
	diff   *cache.Diff
	server *exchange.Server
	reg    *prometheus.Registry
	log    *logBuffer
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Count(l.b.Bytes(), []byte(s))
}

func newHost(t testing.TB) libp2phost.Host {
	t.Helper()
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	h, err := host.New(host.Config{Key: key, Listen: []string{"127.0.0.1:0"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

// options of one node.
type options struct {
	zone   string
	upload *pace.Pacer
	limits exchange.Limits
	quiet  time.Duration
	frames *exchange.Frames
}

func (w *world) node(o options) *node {
	w.t.Helper()
	n := &node{host: newHost(w.t), reg: prometheus.NewRegistry(), log: &logBuffer{}}
	log := slog.New(slog.NewTextHandler(io.MultiWriter(n.log), nil))
	var err error
	if n.swarm, err = New(Config{Host: n.host, Groups: w, Supernode: w, Enter: w.enter, Zone: o.zone, Intake: exchange.Intake{Frames: o.frames}, Log: log, Registerer: n.reg}); err != nil {
		w.t.Fatal(err)
	}
	if o.quiet == 0 {
		o.quiet = time.Millisecond
	}
	if n.cache, err = cache.Open(context.Background(), cache.Config{Root: w.t.TempDir(), Source: n.swarm, Log: log, Quiet: o.quiet, ReadAhead: -1}); err != nil {
		w.t.Fatal(err)
	}
	if n.diff, err = n.cache.Add(context.Background(), w.enc); err != nil {
		w.t.Fatal(err)
	}
	if o.limits == (exchange.Limits{}) {
		o.limits = NodeLimits()
	}
	if n.server, err = exchange.NewServer(n.host, exchange.ServerConfig{Provider: n.swarm.Provider(n.cache), Images: n.swarm.Images(n.cache), Limits: o.limits, Upload: o.upload, Log: log, Registerer: n.reg}); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(n.stop)
	w.join(n.host, o.zone)
	w.nodes = append(w.nodes, n)
	return n
}

// stop ends a node, as kill does for the others.
func (n *node) stop() {
	_ = n.host.Close()
	_ = n.server.Close()
	_ = n.cache.Close()
	_ = n.swarm.Close()
}

// connect has all nodes connected, so that a test does not measure handshakes.
func (w *world) connect() {
	w.t.Helper()
	for i, a := range w.nodes {
		for _, b := range w.nodes[i+1:] {
			if err := a.host.Connect(w.t.Context(), peer.AddrInfo{ID: b.host.ID(), Addrs: b.host.Addrs()}); err != nil {
				w.t.Fatal(err)
			}
		}
	}
}

// read reads chunk i as a container would.
func (w *world) read(n *node, i int) {
	w.t.Helper()
	c := w.ix.Chunks[i]
	p := make([]byte, c.Length)
	if _, err := n.diff.ReadAt(w.t.Context(), p, c.Offset); err != nil {
		w.t.Errorf("chunk %d: %v", i, err)
	} else if !bytes.Equal(p, w.data[c.Offset:][:c.Length]) {
		w.t.Errorf("chunk %d: wrong bytes", i)
	}
}

func (n *node) metric(t testing.TB, name, label string) (v float64) {
	t.Helper()
	families, err := n.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			ok := label == ""
			for _, l := range m.GetLabel() {
				ok = ok || l.GetValue() == label
			}
			if ok {
				v += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return v
}

// impostor is a member whose chunk protocol is serve.
func (w *world) impostor(serve func(network.Stream)) libp2phost.Host {
	h := newHost(w.t)
	if serve != nil {
		h.SetStreamHandler(exchange.ChunkProtocol, func(st network.Stream) {
			defer st.Reset()
			serve(st)
		})
	}
	w.join(h, "")
	return h
}

// otherSide is what a node alone in its zone sees of the others.
type otherSide struct{ *world }

func (o *otherSide) View(id blockdev.Digest) *route.View {
	v := o.world.View(id)
	return &route.View{Group: v.Group, Version: v.Version, Zone: "b", Members: v.Gateways, Gateways: v.Members}
}
