package exchange

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/libp2p/go-libp2p/core/crypto"
	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newHost(t testing.TB, key crypto.PrivKey, listen ...string) libp2phost.Host {
	t.Helper()
	if key == nil {
		var err error
		if key, _, err = crypto.GenerateEd25519Key(rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	h, err := host.New(host.Config{Key: key, Listen: listen})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

const loopback = "127.0.0.1:0"

func newServer(t testing.TB, h libp2phost.Host, c ServerConfig) *Server {
	t.Helper()
	s, err := NewServer(h, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func newClient(t testing.TB, server libp2phost.Host, o Options) *Client {
	t.Helper()
	c, err := NewClient(newHost(t, nil), peer.AddrInfo{ID: server.ID(), Addrs: server.Addrs()}, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// store is a Chunks in memory. hook, if set, runs before each read.
type store struct {
	chunks   map[blockdev.Digest]Encoded
	hook     func(ctx context.Context, d blockdev.Digest) error
	lent     atomic.Int64 // chunks that were not released
	inFlight atomic.Int64
	maxSeen  atomic.Int64
}

func newStore(t testing.TB, compress bool, data ...[]byte) (*store, []blockdev.Chunk) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	s := &store{chunks: make(map[blockdev.Digest]Encoded)}
	var off int64
	chunks := make([]blockdev.Chunk, len(data))
	for i, b := range data {
		chunks[i] = blockdev.Chunk{Offset: off, Length: uint32(len(b)), Digest: blockdev.Sum(b)}
		off += int64(len(b))
		e := Encoded{Data: b, Length: uint32(len(b))}
		if z := enc.EncodeAll(b, nil); compress && len(z) < len(b) {
			e.Data, e.Zstd = z, true
		}
		s.chunks[chunks[i].Digest] = e
	}
	return s, chunks
}

func (s *store) Chunk(ctx context.Context, d blockdev.Digest) (Encoded, error) {
	s.maxSeen.Store(max(s.maxSeen.Load(), s.inFlight.Add(1)))
	defer s.inFlight.Add(-1)
	if s.hook != nil {
		if err := s.hook(ctx, d); err != nil {
			return Encoded{}, err
		}
	}
	e, ok := s.chunks[d]
	if !ok {
		return Encoded{}, fmt.Errorf("chunk %s: %w", d.Hex(), blockdev.ErrNotFound)
	}
	s.lent.Add(1)
	e.Release = func() { s.lent.Add(-1) }
	return e, nil
}

// text is n bytes that compress to about half.
func text(seed uint64, n int) []byte {
	b := blockdevtest.Bytes(seed, n)
	for i := range b {
		if i%8 < 4 {
			b[i] = 'x'
		}
	}
	return b
}

func TestSource(t *testing.T) {
	for name, o := range map[string]Options{"Zstd": {}, "Raw": {Raw: true}} {
		for _, compress := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/compressed=%v", name, compress), func(t *testing.T) {
				blockdevtest.TestSource(t, func(t *testing.T, data [][]byte) blockdev.Source {
					h := newHost(t, nil, loopback)
					st, _ := newStore(t, compress, data...)
					newServer(t, h, ServerConfig{Chunks: st})
					return newClient(t, h, o)
				})
			})
		}
	}
}

func request(p blockdev.Priority, chunks []blockdev.Chunk) blockdev.Request {
	return blockdev.Request{Diff: blockdev.Sum([]byte("diff")), Priority: p, Chunks: chunks}
}

func discard(int, []byte) error { return nil }

// check is a Deliver that compares with data, and counts.
func check(t testing.TB, data [][]byte, n *atomic.Int64) blockdev.Deliver {
	return func(i int, b []byte) error {
		if !bytes.Equal(b, data[i]) {
			t.Errorf("chunk %d: wrong bytes", i)
		}
		n.Add(1)
		return nil
	}
}

// More chunks than one message may ask for.
func TestManyChunks(t *testing.T) {
	data := make([][]byte, 3*wire.MaxDigests+7)
	for i := range data {
		data[i] = text(uint64(i), 1000+i)
	}
	st, chunks := newStore(t, true, data...)
	h := newHost(t, nil, loopback)
	reg := prometheus.NewRegistry()
	newServer(t, h, ServerConfig{Chunks: st, Registerer: reg})
	c := newClient(t, h, Options{})
	var n atomic.Int64
	if err := c.Fetch(t.Context(), request(blockdev.Prefetch, chunks), check(t, data, &n)); err != nil {
		t.Fatal(err)
	}
	if int(n.Load()) != len(chunks) {
		t.Errorf("%d of %d delivered", n.Load(), len(chunks))
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sent := 0.0
	for _, f := range families {
		if f.GetName() == "shoal_p2p_sent_chunks_total" {
			for _, m := range f.GetMetric() {
				sent += m.GetCounter().GetValue()
			}
		}
	}
	if int(sent) != len(chunks) {
		t.Errorf("metrics count %v chunks sent", sent)
	}
}

// What the server has comes, whatever it lacks; and it says what that is.
func TestSomeMissing(t *testing.T) {
	data := [][]byte{text(1, 5000), text(2, 6000), text(3, 7000), text(4, 8000)}
	st, chunks := newStore(t, true, data...)
	delete(st.chunks, chunks[1].Digest)
	st.hook = func(_ context.Context, d blockdev.Digest) error {
		if d == chunks[2].Digest {
			return errors.New("read /store: input/output error\nsecond line")
		}
		return nil
	}
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st})
	c := newClient(t, h, Options{Name: "supernode"})
	var n atomic.Int64
	err := c.Fetch(t.Context(), request(blockdev.Demand, chunks), check(t, data, &n))
	if !errors.Is(err, blockdev.ErrNotFound) || n.Load() != 2 {
		t.Errorf("%v, %d delivered", err, n.Load())
	}
	for _, want := range []string{"supernode " + h.ID().String(), chunks[1].Digest.Hex(), "2 of 4"} {
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("error %q does not say %q", err, want)
		}
	}
	err = c.Fetch(t.Context(), request(blockdev.Demand, chunks[2:3]), discard)
	if !errors.Is(err, blockdev.ErrUnavailable) || !strings.Contains(err.Error(), "input/output error second line") {
		t.Errorf("%v", err)
	}
}

// A chunk whose bytes are wrong costs the sender the stream.
func TestDeliverFindsCorrupt(t *testing.T) {
	data := [][]byte{text(1, 5000), text(2, 6000)}
	st, chunks := newStore(t, true, data...)
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st})
	c := newClient(t, h, Options{})
	calls := 0
	err := c.Fetch(t.Context(), request(blockdev.Demand, chunks), func(int, []byte) error {
		calls++
		return fmt.Errorf("chunk: %w", blockdev.ErrCorrupt)
	})
	if !errors.Is(err, blockdev.ErrCorrupt) || calls != 1 || !strings.Contains(err.Error(), h.ID().String()) {
		t.Errorf("%v after %d calls", err, calls)
	}
	if n := len(c.demand.idle); n != 0 {
		t.Errorf("%d streams of a liar are kept", n)
	}
	full := errors.New("disk full")
	if err := c.Fetch(t.Context(), request(blockdev.Demand, chunks), func(int, []byte) error { return full }); !errors.Is(err, full) || errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("deliver's error comes back as %v", err)
	}
	if err := c.Fetch(t.Context(), request(blockdev.Demand, chunks), discard); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	waitFor(t, "chunks to be given back", func() bool { return st.lent.Load() == 0 })
}

// waitFor polls: what is waited for happens at the other end, soon.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 10 s for %s", what)
		}
	}
}

func TestStreamsAreReused(t *testing.T) {
	data := [][]byte{text(1, 5000)}
	st, chunks := newStore(t, true, data...)
	h := newHost(t, nil, loopback)
	s := newServer(t, h, ServerConfig{Chunks: st})
	c := newClient(t, h, Options{})
	streams := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.streams)
	}
	for range 20 {
		if err := c.Fetch(t.Context(), request(blockdev.Demand, chunks), discard); err != nil {
			t.Fatal(err)
		}
	}
	if n := streams(); n != 1 {
		t.Errorf("20 reads, one after the other, took %d streams", n)
	}
	// An idle stream that the server has closed meanwhile is no failure.
	s.mu.Lock()
	for st := range s.streams {
		_ = st.Reset()
	}
	s.mu.Unlock()
	if err := c.Fetch(t.Context(), request(blockdev.Demand, chunks), discard); err != nil {
		t.Errorf("after the server reset the idle stream: %v", err)
	}
	c.expire(time.Now())
	waitFor(t, "idle streams to be closed at both ends", func() bool { return streams() == 0 })
}

// The server restarts: nothing but a short wait, once it is back.
func TestServerRestarts(t *testing.T) {
	data := [][]byte{text(1, 5000)}
	st, chunks := newStore(t, true, data...)
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	h := newHost(t, key, loopback)
	s := newServer(t, h, ServerConfig{Chunks: st})
	line := host.Addrs(h)[0]
	info, err := host.ParseAddr(line)
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewClient(newHost(t, nil), info, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fetch := func() error { return c.Fetch(t.Context(), request(blockdev.Demand, chunks), discard) }
	if err := fetch(); err != nil || c.Status() != nil {
		t.Fatal(err, c.Status())
	}
	_ = s.Close()
	_ = h.Close()
	waitFor(t, "the loss to be noticed", func() bool { return c.Status() != nil })
	_, port, _ := strings.Cut(line, "127.0.0.1:")
	if err := fetch(); !errors.Is(err, blockdev.ErrUnavailable) || !strings.Contains(err.Error(), port) {
		t.Fatalf("server gone: %v, want ErrUnavailable and the address", err)
	}
	if _, err := c.FetchIndexes(t.Context(), image.Request{Ref: "r/a:1"}); !errors.Is(err, blockdev.ErrUnavailable) || !strings.Contains(err.Error(), "r/a:1") {
		t.Fatalf("server gone: %v, want ErrUnavailable and the image", err)
	}
	var serving atomic.Bool
	c.opts.Restart, c.opts.Ready = time.Hour, func(context.Context) error { // as a membership says so
		if !serving.Load() {
			return blockdev.ErrUnavailable
		}
		return nil
	}
	opened := make(chan error)
	go func() {
		_, err := c.FetchIndexes(t.Context(), testRequest())
		opened <- err
	}()
	h = newHost(t, key, "127.0.0.1:"+port)
	newServer(t, h, ServerConfig{Chunks: st, Images: imagesFunc(func(context.Context, string, image.Request) (*image.Image, error) {
		return testImage(), nil
	})})
	serving.Store(true)
	if err := <-opened; err != nil {
		t.Errorf("an image asked for while the server restarts: %v", err)
	}
	waitFor(t, "the client to connect again", func() bool { return c.Status() == nil })
	if err := fetch(); err != nil {
		t.Fatal(err)
	}
}

func TestBusy(t *testing.T) {
	data := [][]byte{text(1, 5000), text(2, 5000)}
	st, chunks := newStore(t, true, data...)
	release := make(chan struct{})
	entered := make(chan struct{}, 10)
	st.hook = func(_ context.Context, d blockdev.Digest) error {
		if d == chunks[0].Digest {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st, Limits: Limits{DemandPerPeer: 1, PrefetchPerPeer: 1}})
	a, b := newClient(t, h, Options{}), newClient(t, h, Options{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := a.Fetch(t.Context(), request(blockdev.Demand, chunks[:1]), discard); err != nil {
			t.Error(err)
		}
	})
	<-entered
	err := a.Fetch(t.Context(), request(blockdev.Demand, chunks[1:]), discard)
	if !errors.Is(err, wire.ErrBusy) || !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("over the limit: %v, want ErrBusy", err)
	}
	// Others, and the other kind, have limits of their own.
	if err := a.Fetch(t.Context(), request(blockdev.Prefetch, chunks[1:]), discard); err != nil {
		t.Errorf("prefetch of the same node: %v", err)
	}
	if err := b.Fetch(t.Context(), request(blockdev.Demand, chunks[1:]), discard); err != nil {
		t.Errorf("demand of another node: %v", err)
	}
	close(release)
	wg.Wait()
	if err := a.Fetch(t.Context(), request(blockdev.Demand, chunks[1:]), discard); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// A client that keeps to the limits is never told that it is over them.
func TestNotBusyAtTheLimit(t *testing.T) {
	data := [][]byte{text(1, 5000)}
	st, chunks := newStore(t, true, data...)
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st, Limits: Limits{DemandPerPeer: 2}})
	c := newClient(t, h, Options{Demand: 2})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				if err := c.Fetch(t.Context(), request(blockdev.Demand, chunks), discard); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// While a demand request of a peer is worked on, its prefetch sends nothing but
// a chunk per pause.
func TestDemandGoesFirst(t *testing.T) {
	data := make([][]byte, 20)
	for i := range data {
		data[i] = text(uint64(i), 5000)
	}
	st, chunks := newStore(t, true, data...)
	inDemand, release := make(chan struct{}), make(chan struct{})
	st.hook = func(_ context.Context, d blockdev.Digest) error {
		if d == chunks[19].Digest {
			close(inDemand)
			<-release
		}
		return nil
	}
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st, Limits: Limits{DemandPause: time.Hour}})
	c := newClient(t, h, Options{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.Fetch(t.Context(), request(blockdev.Demand, chunks[19:]), discard); err != nil {
			t.Error(err)
		}
	})
	<-inDemand
	var n atomic.Int64
	wg.Go(func() {
		if err := c.Fetch(t.Context(), request(blockdev.Prefetch, chunks[:19]), check(t, data, &n)); err != nil {
			t.Error(err)
		}
	})
	waitFor(t, "the prefetch to be read ahead", func() bool { return st.lent.Load() > 0 })
	if n.Load() != 0 {
		t.Errorf("%d prefetched chunks overtook a demand read", n.Load())
	}
	close(release)
	wg.Wait()
	if n.Load() != 19 {
		t.Errorf("%d of 19 prefetched", n.Load())
	}
}

// A steady stream of demand slows prefetch down but does not stop it.
func TestPrefetchTrickles(t *testing.T) {
	data := [][]byte{text(1, 5000), text(2, 5000)}
	st, chunks := newStore(t, true, data...)
	inDemand, release := make(chan struct{}), make(chan struct{})
	st.hook = func(_ context.Context, d blockdev.Digest) error {
		if d == chunks[1].Digest {
			close(inDemand)
			<-release
		}
		return nil
	}
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st, Limits: Limits{DemandPause: time.Millisecond}})
	c := newClient(t, h, Options{})
	var wg sync.WaitGroup
	wg.Go(func() { _ = c.Fetch(t.Context(), request(blockdev.Demand, chunks[1:]), discard) })
	<-inDemand
	if err := c.Fetch(t.Context(), request(blockdev.Prefetch, chunks[:1]), discard); err != nil {
		t.Error(err)
	}
	close(release)
	wg.Wait()
}

// However much is asked for, the store is read a few chunks ahead, no more.
func TestReadAheadIsBounded(t *testing.T) {
	data := make([][]byte, 100)
	for i := range data {
		data[i] = blockdevtest.Bytes(uint64(i), blockdev.MaxChunk)
	}
	st, chunks := newStore(t, false, data...)
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st, Limits: Limits{ReadAhead: 3}})
	c := newClient(t, h, Options{})
	first, release := make(chan struct{}), make(chan struct{})
	var n atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		verify := check(t, data, &n)
		err := c.Fetch(t.Context(), request(blockdev.Prefetch, chunks), func(i int, b []byte) error {
			if i == 0 {
				close(first)
				<-release // a client that does not read on
			}
			if lent := st.lent.Load(); lent > 5 {
				t.Errorf("%d chunks are held for one stream", lent)
			}
			return verify(i, b)
		})
		if err != nil {
			t.Error(err)
		}
	})
	<-first
	close(release)
	wg.Wait()
	if n.Load() != 100 || st.maxSeen.Load() > 4 {
		t.Errorf("%d delivered, %d store reads at once", n.Load(), st.maxSeen.Load())
	}
	waitFor(t, "chunks to be given back", func() bool { return st.lent.Load() == 0 })
}

// A cancelled fetch frees what the server does for it.
func TestCancelReachesServer(t *testing.T) {
	data := make([][]byte, 50)
	for i := range data {
		data[i] = blockdevtest.Bytes(uint64(i), blockdev.MaxChunk)
	}
	st, chunks := newStore(t, false, data...)
	h := newHost(t, nil, loopback)
	s := newServer(t, h, ServerConfig{Chunks: st})
	c := newClient(t, h, Options{})
	why := errors.New("container was removed")
	ctx, cancel := context.WithCancelCause(t.Context())
	err := c.Fetch(ctx, request(blockdev.Prefetch, chunks), func(i int, _ []byte) error {
		if i == 3 {
			cancel(why)
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || !errors.Is(err, why) {
		t.Errorf("%v, want Canceled and its cause", err)
	}
	waitFor(t, "the server to let go", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.streams) == 0 && st.lent.Load() == 0
	})
	if n := s.admit.now; n != [kinds]int{} || len(s.admit.peers) != 0 {
		t.Errorf("still counted: %v, %d peers", n, len(s.admit.peers))
	}
}

func TestCloseEndsRequests(t *testing.T) {
	data := [][]byte{text(1, 5000)}
	st, chunks := newStore(t, true, data...)
	entered := make(chan struct{})
	st.hook = func(ctx context.Context, _ blockdev.Digest) error {
		close(entered)
		<-ctx.Done()
		return ctx.Err()
	}
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st, Limits: Limits{ChunkTimeout: time.Hour}})
	c := newClient(t, h, Options{})
	done := make(chan error)
	go func() { done <- c.Fetch(t.Context(), request(blockdev.Demand, chunks), discard) }()
	<-entered
	_ = c.Close()
	if err := <-done; !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("%v, want ErrUnavailable", err)
	}
	if err := c.Fetch(t.Context(), request(blockdev.Demand, chunks), discard); !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
}

func TestNewClientRefuses(t *testing.T) {
	h := newHost(t, nil, loopback)
	for name, info := range map[string]peer.AddrInfo{
		"no address": {ID: "x"}, "no ID": {Addrs: h.Addrs()}, "itself": {ID: h.ID(), Addrs: h.Addrs()},
	} {
		if c, err := NewClient(h, info, Options{}); err == nil {
			t.Errorf("%s: accepted", name)
			_ = c.Close()
		}
	}
}
