package swarm

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/route"
)

// packed is a supernode's store, of compressed chunks.
type packed map[blockdev.Digest]exchange.Encoded

func (p packed) Chunk(_ context.Context, d blockdev.Digest) (exchange.Encoded, error) {
	e, ok := p[d]
	if !ok {
		return e, blockdev.ErrNotFound
	}
	return e, nil
}

// What came compressed is passed on as it came.
func TestPassOn(t *testing.T) {
	w := newWorld(t, 4<<20)
	for i := 0; i < len(w.data); i += 1 << 10 {
		clear(w.data[i:][:512]) // so that it can be compressed
	}
	w.ix.Chunks = blockdevtest.Cut(7, w.data)
	var err error
	if w.enc, err = index.Encode(w.ix); err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	store := packed{}
	for _, c := range w.ix.Chunks {
		b := z.EncodeAll(w.data[c.Offset:][:c.Length], nil)
		store[c.Digest] = exchange.Encoded{Data: b, Zstd: true, Length: c.Length}
	}
	super := newHost(t)
	server, err := exchange.NewServer(super, exchange.ServerConfig{Chunks: store})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	for range 4 {
		n := w.node(options{frames: exchange.NewFrames(16 << 20)})
		c, err := exchange.NewClient(n.host, peer.AddrInfo{ID: super.ID(), Addrs: super.Addrs()}, exchange.Options{Intake: n.swarm.cfg.Intake})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		n.swarm.Supernode = c
	}
	w.connect()
	var wg sync.WaitGroup
	for _, n := range w.nodes {
		wg.Go(func() {
			if err := n.diff.Prefetch(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	var sent, received float64
	for _, n := range w.nodes {
		for i := range w.ix.Chunks {
			w.read(n, i)
		}
		sent += n.metric(t, "shoal_p2p_sent_bytes_total", "")
		received += n.metric(t, "shoal_node_received_bytes_total", "peer")
	}
	if sent == 0 || sent > received*3/4 {
		t.Errorf("nodes have sent %.0f bytes for chunks of %.0f", sent, received)
	}
}

// A chunk that this node's own disk does not take is not the peer's fault, and not asked
// of another one: the search is over.
func TestOwnDiskFails(t *testing.T) {
	w := newWorld(t, 1<<20)
	n := w.node(options{})
	c := w.ix.Chunks[0]
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	f := &search{
		s: n.swarm, ctx: ctx, req: blockdev.Request{Chunks: []blockdev.Chunk{c}}, want: []want{{flying: 1}}, changed: make(chan struct{}, 1),
		deliver: func(int, []byte) error { return syscall.ENOSPC },
	}
	b := &batch{f: f, ctx: ctx, target: route.Target{Kind: route.Peer}, chunks: []int{0}, done: make([]bool, 1)}
	err := b.deliver(0, w.data[c.Offset:][:c.Length])
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	b.finish(err)
	if len(f.back) != 0 || f.want[0].err != nil {
		t.Errorf("the peer is blamed with %v, chunks %v are asked for again", f.want[0].err, f.back)
	}
}

// Of a chunk that comes a second time somebody has to look at the bytes, too: nil
// says that they may be passed on.
func TestSecondTime(t *testing.T) {
	w := newWorld(t, 1<<20)
	n := w.node(options{})
	c := w.ix.Chunks[0]
	f := &search{s: n.swarm, req: blockdev.Request{Chunks: []blockdev.Chunk{c}}, want: []want{{got: true, flying: 2}}}
	b := &batch{f: f, target: route.Target{Kind: route.Peer}, chunks: []int{0}, done: make([]bool, 1)}
	wrong := make([]byte, c.Length)
	if err := b.deliver(0, wrong); !errors.Is(err, blockdev.ErrCorrupt) {
		t.Errorf("wrong bytes: %v", err)
	}
	if err := b.deliver(0, w.data[c.Offset:][:c.Length]); err != nil {
		t.Errorf("right bytes: %v", err)
	}
}
