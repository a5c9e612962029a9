package swarm

import (
	"bufio"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/p2p/wire"
)

// answers serves requests with what frames makes of each, for ever.
func answers(frames func(w io.Writer, req *wire.ChunkRequest) error) func(network.Stream) {
	return func(st network.Stream) {
		r := bufio.NewReader(st)
		for {
			b, err := wire.ReadFrame(r, wire.MaxChunkRequest, nil)
			if err != nil {
				return
			}
			req, err := wire.ParseChunkRequest(b)
			if err != nil {
				return
			}
			if err := frames(st, req); err != nil {
				return
			}
		}
	}
}

func send(w io.Writer, ms ...proto.Message) error {
	for _, m := range ms {
		b, err := wire.AppendMessage(nil, m)
		if err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

var end = &wire.ChunkFrame{End: true}

// length is that of the chunk with this digest.
func (w *world) length(d blockdev.Digest) int {
	for _, c := range w.ix.Chunks {
		if c.Digest == d {
			return int(c.Length)
		}
	}
	return 0
}

// waits connects n to h, and has n learn that answers take long, so that it judges h by
// its answers also on a machine that has too much to do.
func (n *node) waits(w *world, h libp2phost.Host) {
	w.t.Helper()
	if err := n.host.Connect(w.t.Context(), peer.AddrInfo{ID: h.ID(), Addrs: h.Addrs()}); err != nil {
		w.t.Fatal(err)
	}
	g := n.swarm.group(w.ix.DiffID)
	for range w.ix.Chunks {
		ask := route.NewAsk(w.ix.Chunks[0].Digest, blockdev.Demand, 0)
		g.Report(&ask, route.Target{Kind: route.Supernode}, route.OK, n.swarm.now(), 10*time.Second, 0)
	}
}

// Whatever peers do, every read gets the right bytes, what they did is counted,
// and the log has one line.
func TestHostilePeers(t *testing.T) {
	w := newWorld(t, 4<<20)
	for name, c := range map[string]struct {
		serve  func(network.Stream)
		reason string // of the metric
		logs   string
	}{
		"wrong bytes": {answers(func(st io.Writer, req *wire.ChunkRequest) error {
			for i := range req.Count() {
				b := make([]byte, w.length(req.Digest(i)))
				if err := send(st, &wire.ChunkFrame{Index: uint32(i), Data: b, Length: uint32(len(b))}); err != nil {
					return err
				}
			}
			return send(st, end)
		}), "corrupt", "a peer sent"},
		"wrong length": {answers(func(st io.Writer, _ *wire.ChunkRequest) error {
			return send(st, &wire.ChunkFrame{Data: []byte("short"), Length: 5}, end)
		}), "corrupt", "a peer sent"},
		"endless frames": {answers(func(st io.Writer, req *wire.ChunkRequest) error {
			for {
				if err := send(st, &wire.ChunkFrame{Index: 7, Error: &wire.Error{Code: wire.Code_CODE_NOT_FOUND}}); err != nil {
					return err
				}
			}
		}), "corrupt", "a peer sent"},
		"an old answer": {answers(func(st io.Writer, _ *wire.ChunkRequest) error {
			b := w.data[:w.ix.Chunks[0].Length]
			return send(st, &wire.ChunkFrame{Data: b, Length: uint32(len(b))}, end)
		}), "corrupt", "a peer sent"},
		"garbage": {func(st network.Stream) {
			_, _ = st.Write([]byte("HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"))
			_, _ = io.Copy(io.Discard, st)
		}, "corrupt", "a peer sent"},
		"stalls":          {func(st network.Stream) { _, _ = io.Copy(io.Discard, st) }, "slow", ""},
		"hangs up":        {func(network.Stream) {}, "dead", "does not answer"},
		"another version": {nil, "dead", "does not answer"},
		"always busy": {answers(func(st io.Writer, _ *wire.ChunkRequest) error {
			return send(st, &wire.ChunkFrame{End: true, Error: &wire.Error{Code: wire.Code_CODE_BUSY}})
		}), "busy", ""},
		"has nothing": {answers(func(st io.Writer, req *wire.ChunkRequest) error {
			for i := range req.Count() {
				if err := send(st, &wire.ChunkFrame{Index: uint32(i), Error: &wire.Error{Code: wire.Code_CODE_NOT_FOUND}}); err != nil {
					return err
				}
			}
			return send(st, end)
		}), "missing", ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 4<<20)
			n := w.node(options{})
			h := w.impostor(c.serve)
			if c.reason != "slow" { // then what it sends counts, however late it is here
				n.waits(w, h)
			}
			for i := range w.ix.Chunks {
				w.read(n, i)
			}
			if n.metric(t, "shoal_node_peer_failures_total", c.reason) == 0 {
				t.Errorf("nothing is counted as %s", c.reason)
			}
			if c.logs != "" && n.log.count(c.logs) != 1 {
				t.Errorf("%d lines of %q in the log, want 1", n.log.count(c.logs), c.logs)
			}
			if n.log.count("a read has failed") > 0 {
				t.Error("a read has failed")
			}
		})
	}
}

// Nobody waits to see whether a peer that has failed is back: it is asked together with
// somebody else, also where no bytes are left for asking twice.
func TestDoubtfulPeer(t *testing.T) {
	w := newWorld(t, 4<<20)
	n := w.node(options{})
	silent := w.impostor(func(st network.Stream) { _, _ = io.Copy(io.Discard, st) })
	for n.swarm.book.Hedge(1 << 10) {
	}
	n.swarm.book.Judge(string(silent.ID()), route.Dead, n.swarm.now()-time.Minute)
	for i := range w.ix.Chunks {
		w.read(n, i)
		if n.metric(t, "shoal_node_hedges_total", "") > 0 {
			return
		}
	}
	t.Error("nothing was asked for twice")
}

// A peer that asks for more than its share is told so, and others are served.
func TestFlood(t *testing.T) {
	w := newWorld(t, 2<<20)
	n := w.node(options{limits: exchange.Limits{DemandPerPeer: 2, PrefetchPerPeer: 2}})
	for i := range w.ix.Chunks {
		w.read(n, i)
	}
	flooder := newHost(t)
	w.join(flooder, "")
	c, err := exchange.NewClient(flooder, peer.AddrInfo{ID: n.host.ID(), Addrs: n.host.Addrs()}, exchange.Options{Demand: 128})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w.connect()
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	var busy, ok int
	var mu sync.Mutex
	for range 64 {
		wg.Go(func() {
			for ctx.Err() == nil {
				err := c.FetchVia(ctx, exchange.Via{Group: theGroup, Hops: 1}, blockdev.Request{Diff: w.ix.DiffID, Priority: blockdev.Demand, Chunks: w.ix.Chunks}, func(int, []byte) error { return nil })
				mu.Lock()
				if errors.Is(err, wire.ErrBusy) {
					busy++
				} else if err == nil {
					ok++
				}
				mu.Unlock()
			}
		})
	}
	// The flood takes this machine's processors, too. So a node may find that the
	// supernode is sooner for all that it reads, and the next one tries.
	var served float64
	for began := time.Now(); served == 0 && time.Since(began) < 20*time.Second; {
		other := w.node(options{})
		w.connect()
		for i := range w.ix.Chunks {
			w.read(other, i)
		}
		served = other.metric(t, "shoal_node_received_bytes_total", "peer")
	}
	cancel()
	wg.Wait()
	if busy == 0 {
		t.Errorf("a flood of requests was served: %d, never busy", ok)
	}
	if served == 0 {
		t.Error("the flood kept the node from serving others")
	}
}

// Who is not in the group gets nothing, not even a different answer from the one
// for what is not there.
func TestStranger(t *testing.T) {
	w := newWorld(t, 1<<20)
	n := w.node(options{})
	w.read(n, 0)
	stranger := newHost(t)
	c, err := exchange.NewClient(stranger, peer.AddrInfo{ID: n.host.ID(), Addrs: n.host.Addrs()}, exchange.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, g := range []blockdev.Digest{theGroup, blockdev.Sum([]byte("other")), {}} {
		err := c.FetchVia(t.Context(), exchange.Via{Group: g, Hops: 1}, blockdev.Request{Diff: w.ix.DiffID, Priority: blockdev.Demand, Chunks: w.ix.Chunks[:1]},
			func(int, []byte) error { t.Error("a stranger gets a chunk"); return nil })
		if !errors.Is(err, blockdev.ErrNotFound) {
			t.Errorf("%v, want not found", err)
		}
	}
	if n.metric(t, "shoal_node_refused_requests_total", "") != 3 {
		t.Error("refusals are not counted")
	}
}

// A parent dies, or hangs, in the middle of demand reads: no read fails, and each
// is answered soon.
func TestParentKilled(t *testing.T) {
	w := newWorld(t, 8<<20)
	for range 4 {
		w.node(options{})
	}
	var wg sync.WaitGroup
	for _, n := range w.nodes[:3] {
		wg.Go(func() {
			if err := n.diff.Prefetch(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	reader := w.nodes[3]
	var took []time.Duration
	for i := range w.ix.Chunks {
		if i == len(w.ix.Chunks)/3 {
			wg.Go(w.nodes[0].stop)
		}
		begin := time.Now()
		w.read(reader, i)
		took = append(took, time.Since(begin))
	}
	wg.Wait()
	slices.Sort(took)
	t.Logf("reads while a parent dies: p50 %v, worst %v", took[len(took)/2], took[len(took)-1])
	if n := reader.log.count("a read has failed"); n > 0 {
		t.Errorf("%d reads failed", n)
	}
}

// askedStore is a Store of which nothing may be asked.
type askedStore struct{ asked int }

func (s *askedStore) EncodedIndex(blockdev.Digest) ([]byte, error) {
	s.asked++
	return nil, blockdev.ErrNotFound
}

func (s *askedStore) Forward(blockdev.Digest, blockdev.Priority, int, []blockdev.Digest) (*cache.Forward, error) {
	s.asked++
	return nil, errors.New("asked")
}

// Who is in a group gets nothing of the node's other images by it.
func TestOtherImage(t *testing.T) {
	w := newWorld(t, 1<<20)
	n, member := w.node(options{}), w.node(options{})
	store := &askedStore{}
	p := n.swarm.Provider(store)
	for _, diff := range []blockdev.Digest{blockdev.Sum([]byte("of another image")), {}} {
		_, err := p.Provide(t.Context(), &exchange.Query{From: member.host.ID(), Group: theGroup, Diff: diff, Digests: []blockdev.Digest{{1}}})
		if !errors.Is(err, blockdev.ErrNotFound) || store.asked != 0 {
			t.Errorf("%v; the store was asked %d times", err, store.asked)
		}
	}
	if _, err := p.Provide(t.Context(), &exchange.Query{From: member.host.ID(), Group: theGroup, Diff: w.ix.DiffID}); store.asked != 1 {
		t.Errorf("not asked for the group's own image: %v", err)
	}
}
