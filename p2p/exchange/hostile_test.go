package exchange

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/wire"
)

func encode(t testing.TB, ms ...proto.Message) (b []byte) {
	t.Helper()
	for _, m := range ms {
		var err error
		if b, err = wire.AppendMessage(b, m); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// liar is a server that answers each request on protocol p with what write
// writes, and then closes, or leaves the stream open.
func liar(t *testing.T, p protocol.ID, o Options, write func(io.Writer) error, stayOpen bool) *Client {
	t.Helper()
	h := newHost(t, nil, loopback)
	h.SetStreamHandler(p, func(s network.Stream) {
		if _, err := wire.ReadFrame(bufio.NewReader(s), wire.MaxImageRequest, nil); err != nil {
			_ = s.Reset()
			return
		}
		if err := write(s); err != nil || !stayOpen {
			_ = s.Close()
			return
		}
		_, _ = io.Copy(io.Discard, s) // until the client lets go
		_ = s.Reset()
	})
	return newClient(t, h, o)
}

func sends(b []byte) func(io.Writer) error {
	return func(w io.Writer) error { _, err := w.Write(b); return err }
}

func TestHostileChunkServer(t *testing.T) {
	data := [][]byte{text(1, 5000), text(2, 6000)}
	_, chunks := newStore(t, false, data...)
	good := func(i int) *wire.ChunkFrame {
		return &wire.ChunkFrame{Index: uint32(i), Data: data[i], Length: uint32(len(data[i]))}
	}
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	squeeze := func(b []byte) []byte { return enc.EncodeAll(b, nil) }
	var stream bytes.Buffer // a frame without a content size
	sw, err := zstd.NewWriter(&stream)
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if _, err := sw.Write(make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	if err := sw.Close(); err != nil {
		t.Fatal(err)
	}
	end := &wire.ChunkFrame{End: true}
	endless := func(frame []byte) func(io.Writer) error {
		return func(w io.Writer) error {
			for {
				if _, err := w.Write(frame); err != nil {
					return err
				}
			}
		}
	}
	for _, c := range []struct {
		name      string
		write     func(io.Writer) error
		delivered int
		want      error
		says      string
	}{
		{"garbage", sends([]byte("HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nno")), 0, blockdev.ErrCorrupt, ""},
		{"nothing", sends(nil), 0, blockdev.ErrUnavailable, ""},
		{"cut", sends(encode(t, good(0))[:100]), 0, blockdev.ErrUnavailable, ""},
		{"beyond the last", sends(encode(t, &wire.ChunkFrame{Index: 2, Data: data[0], Length: 5000})), 0, blockdev.ErrCorrupt, "chunk 2, which"},
		{"another's length", sends(encode(t, &wire.ChunkFrame{Index: 1, Data: data[0], Length: 5000})), 0, blockdev.ErrCorrupt, "its index says 6000"},
		{"twice", sends(encode(t, good(0), good(0))), 1, blockdev.ErrCorrupt, "chunk 0, which"},
		{"one too many", sends(encode(t, good(0), good(1), good(1))), 2, blockdev.ErrCorrupt, ""},
		{"endless chunks", endless(encode(t, good(0))), 1, blockdev.ErrCorrupt, ""},
		{"endless message", func(w io.Writer) error {
			_, err := w.Write([]byte{0xff, 0xff, 0xff, 0xff, 0x0f})
			for err == nil {
				_, err = w.Write(make([]byte, 4096))
			}
			return err
		}, 0, blockdev.ErrCorrupt, "at most"},
		{"end too early", sends(encode(t, good(0), end)), 1, blockdev.ErrCorrupt, "after 1 of 2"},
		{"another length", sends(encode(t, &wire.ChunkFrame{Data: data[0][:4999], Length: 4999})), 0, blockdev.ErrCorrupt, "its index says 5000"},
		{"larger than asked for", sends(encode(t, &wire.ChunkFrame{Data: make([]byte, blockdev.MaxChunk), Length: blockdev.MaxChunk})), 0, blockdev.ErrCorrupt, ""},
		{"zstd: garbage", sends(encode(t, &wire.ChunkFrame{Data: data[0], Zstd: true, Length: 5000})), 0, blockdev.ErrCorrupt, "zstd"},
		{"zstd: shorter", sends(encode(t, &wire.ChunkFrame{Data: squeeze(data[0][:4000]), Zstd: true, Length: 5000})), 0, blockdev.ErrCorrupt, "zstd"},
		{"zstd: longer", sends(encode(t, &wire.ChunkFrame{Data: squeeze(make([]byte, 1<<24)), Zstd: true, Length: 5000})), 0, blockdev.ErrCorrupt, "zstd"},
		{"zstd: bomb of unknown size", sends(encode(t, &wire.ChunkFrame{Data: stream.Bytes()[:5000], Zstd: true, Length: 5000})), 0, blockdev.ErrCorrupt, "zstd"},
		{"all refused", sends(encode(t, &wire.ChunkFrame{End: true, Error: &wire.Error{Code: wire.Code_CODE_NOT_FOUND, Text: "no\x1b[2Jsuch diff"}})), 0, blockdev.ErrNotFound, "no [2Jsuch diff"},
	} {
		t.Run(c.name, func(t *testing.T) {
			client := liar(t, ChunkProtocol, Options{}, c.write, false)
			n := 0
			err := client.Fetch(t.Context(), request(blockdev.Demand, chunks), func(int, []byte) error { n++; return nil })
			if !errors.Is(err, c.want) || n != c.delivered {
				t.Errorf("%d delivered, %v; want %d, %v", n, err, c.delivered, c.want)
			}
			if !strings.Contains(fmt.Sprint(err), c.says) || !strings.Contains(fmt.Sprint(err), client.Peer().String()) {
				t.Errorf("%q does not say %q, or not who", err, c.says)
			}
			if errors.Is(c.want, blockdev.ErrCorrupt) && len(client.demand.idle) > 0 {
				t.Error("the stream is kept")
			}
		})
	}
}

// A server that goes silent, or drips, fails a read within the limit, with or
// without a deadline of the caller.
func TestStalledServer(t *testing.T) {
	data := text(1, 5000)
	_, chunks := newStore(t, false, data)
	frame := encode(t, &wire.ChunkFrame{Data: data, Length: 5000})
	for name, write := range map[string]func(io.Writer) error{
		"silent":            sends(nil),
		"silent in a frame": sends(frame[:2000]),
		"drips": func(w io.Writer) error {
			for i := range frame {
				if _, err := w.Write(frame[i : i+1]); err != nil {
					return err
				}
				time.Sleep(20 * time.Millisecond)
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := liar(t, ChunkProtocol, Options{DemandTimeout: 200 * time.Millisecond}, write, true)
			err := c.Fetch(t.Context(), request(blockdev.Demand, chunks), discard)
			if !errors.Is(err, blockdev.ErrUnavailable) || !strings.Contains(err.Error(), "no progress for 200ms") {
				t.Errorf("%v", err)
			}
			c = liar(t, ChunkProtocol, Options{}, write, true)
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if err := c.Fetch(ctx, request(blockdev.Demand, chunks), discard); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, want DeadlineExceeded", err)
			}
		})
	}
}

func TestHostileIndexServer(t *testing.T) {
	d := make([]byte, 32)
	header := func(lengths ...int64) *wire.ImageFrame {
		h := &wire.ImageHeader{Manifest: d}
		for _, n := range lengths {
			h.Layers = append(h.Layers, &wire.LayerHeader{Digest: d, DiffId: d, Size: 1, IndexLength: n})
		}
		return &wire.ImageFrame{Part: &wire.ImageFrame_Header{Header: h}}
	}
	part := func(layer, n int) *wire.ImageFrame {
		return &wire.ImageFrame{Part: &wire.ImageFrame_Data{Data: &wire.IndexData{Layer: uint32(layer), Data: make([]byte, n)}}}
	}
	end := &wire.ImageFrame{Part: &wire.ImageFrame_End{End: &wire.End{}}}
	working := &wire.ImageFrame{Part: &wire.ImageFrame_Working{Working: &wire.Working{}}}
	for _, c := range []struct {
		name  string
		write func(io.Writer) error
		want  error
	}{
		{"garbage", sends(bytes.Repeat([]byte{0xee}, 100)), blockdev.ErrCorrupt},
		{"nothing", sends(nil), blockdev.ErrUnavailable},
		{"end alone", sends(encode(t, end)), blockdev.ErrCorrupt},
		{"data alone", sends(encode(t, part(0, 1))), blockdev.ErrCorrupt},
		{"two headers", sends(encode(t, header(1), header(1))), blockdev.ErrCorrupt},
		{"incomplete", sends(encode(t, header(5, 5), part(0, 5), part(1, 4), end)), blockdev.ErrCorrupt},
		{"cut", sends(encode(t, header(5, 5), part(0, 5))), blockdev.ErrUnavailable},
		{"wrong order", sends(encode(t, header(5, 5), part(1, 5))), blockdev.ErrCorrupt},
		{"too much", sends(encode(t, header(5), part(0, 6))), blockdev.ErrCorrupt},
		{"too much behind", sends(encode(t, header(5), part(0, 5), part(0, 1))), blockdev.ErrCorrupt},
		{"beyond the layers", sends(encode(t, header(5), part(7, 5))), blockdev.ErrCorrupt},
		{"layer without index", sends(encode(t, header(0), end)), blockdev.ErrCorrupt},
		{"claims too much", sends(encode(t, header(wire.MaxIndex+1))), blockdev.ErrCorrupt},
		{"claims too much in all", sends(encode(t, header(wire.MaxIndex, wire.MaxIndex, wire.MaxIndex, wire.MaxIndex, 1))), blockdev.ErrCorrupt},
		{"claims what overflows", sends(encode(t, header(1<<62, 1<<62, 1<<62))), blockdev.ErrCorrupt},
		{"negative", sends(encode(t, header(-1))), blockdev.ErrCorrupt},
		{"endless working", func(w io.Writer) error {
			for b := encode(t, working); ; {
				if _, err := w.Write(b); err != nil {
					return err
				}
			}
		}, blockdev.ErrCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			client := liar(t, ImageProtocol, Options{}, c.write, false)
			img, err := client.FetchIndexes(t.Context(), image.Request{Ref: "r/a:1"})
			if !errors.Is(err, c.want) || img != nil {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	t.Run("no room", func(t *testing.T) {
		full := errors.New("full")
		client := liar(t, ImageProtocol, Options{}, sends(encode(t, header(5, 7))), true)
		img, err := client.FetchIndexes(t.Context(), image.Request{Ref: "r/a:1", Admit: func(n int64) error {
			if n != 12 {
				t.Errorf("room for %d bytes is asked for, want 12", n)
			}
			return full
		}})
		if !errors.Is(err, full) || errors.Is(err, blockdev.ErrUnavailable) || img != nil {
			t.Errorf("%v", err) // another supernode would be asked for what is not the fault of this one
		}
	})
	t.Run("silent", func(t *testing.T) {
		client := liar(t, ImageProtocol, Options{ImageTimeout: 200 * time.Millisecond}, sends(encode(t, header(5))), true)
		if _, err := client.FetchIndexes(t.Context(), image.Request{Ref: "r/a:1"}); !errors.Is(err, blockdev.ErrUnavailable) {
			t.Errorf("%v", err)
		}
	})
}

// Another version, or a machine that is no server at all.
func TestUnknownProtocol(t *testing.T) {
	h := newHost(t, nil, loopback)
	h.SetStreamHandler("/shoal/chunk/2", func(s network.Stream) { _ = s.Reset() })
	c := newClient(t, h, Options{})
	_, chunks := newStore(t, false, []byte("x"))
	if err := c.Fetch(t.Context(), request(blockdev.Demand, chunks), discard); !errors.Is(err, blockdev.ErrUnavailable) || !strings.Contains(err.Error(), "another version of shoal") {
		t.Errorf("%v", err)
	}
	if _, err := c.FetchIndexes(t.Context(), image.Request{Ref: "r/a:1"}); !errors.Is(err, blockdev.ErrUnavailable) || !strings.Contains(err.Error(), "another version of shoal") {
		t.Errorf("%v", err)
	}
}

// dial opens a raw stream to a server.
func dial(t *testing.T, server peer.AddrInfo, p protocol.ID) network.Stream {
	t.Helper()
	h := newHost(t, nil)
	if err := h.Connect(t.Context(), server); err != nil {
		t.Fatal(err)
	}
	s, err := h.NewStream(t.Context(), server.ID, p)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestHostileClients(t *testing.T) {
	data := make([][]byte, wire.MaxDigests)
	for i := range data {
		data[i] = blockdevtest.Bytes(uint64(i), 64<<10)
	}
	st, chunks := newStore(t, false, data...)
	h := newHost(t, nil, loopback)
	s := newServer(t, h, ServerConfig{
		Chunks: st,
		Images: imagesFunc(func(context.Context, string, image.Request) (*image.Image, error) { return testImage(), nil }),
		Limits: Limits{WriteTimeout: time.Second, IdleTimeout: time.Second},
	})
	info := peer.AddrInfo{ID: h.ID(), Addrs: h.Addrs()}
	idle := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.streams) == 0 && st.lent.Load() == 0
	}
	all := &wire.ChunkRequest{Diff: make([]byte, 32)}
	for _, c := range chunks {
		all.Digests = append(all.Digests, c.Digest[:]...)
	}
	// The server's answer to what breaks the rules says so.
	for _, p := range []protocol.ID{ChunkProtocol, ImageProtocol} {
		raw := dial(t, info, p)
		if _, err := raw.Write(encode(t, &wire.ChunkRequest{Diff: []byte("short")})); err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(raw)
		if err != nil || !bytes.Contains(answer, []byte("corrupt data")) {
			t.Errorf("%s: answer %q, %v", p, answer, err)
		}
		waitFor(t, "the stream to end", idle)
	}
	for name, b := range map[string][]byte{
		"garbage":           []byte("GET / HTTP/1.1\r\n\r\n"),
		"too long":          {0xff, 0xff, 0x7f},
		"endless varint":    bytes.Repeat([]byte{0xff}, 100),
		"nothing":           nil,
		"half a request":    encode(t, all)[:100],
		"never reads":       bytes.Repeat(encode(t, all), 20),
		"asks and is gone":  encode(t, all),
		"unknown priority":  encode(t, &wire.ChunkRequest{Diff: make([]byte, 32), Digests: all.Digests[:32], Priority: 99}),
		"one ms to live":    encode(t, &wire.ChunkRequest{Diff: make([]byte, 32), Digests: all.Digests, TimeoutMs: 1}),
		"digests unknown":   encode(t, &wire.ChunkRequest{Diff: make([]byte, 32), Digests: make([]byte, 32*wire.MaxDigests)}),
		"more than allowed": encode(t, &wire.ChunkRequest{Diff: make([]byte, 32), Digests: make([]byte, 32*(wire.MaxDigests+1))}),
	} {
		t.Run(name, func(t *testing.T) {
			for _, p := range []protocol.ID{ChunkProtocol, ImageProtocol} {
				raw := dial(t, info, p)
				// The server may have reset it before all is written.
				_, _ = raw.Write(b)
				if name == "asks and is gone" {
					_ = raw.Reset()
				}
				waitFor(t, "the server to drop the client", idle)
			}
		})
	}
	// It serves others as ever, and counts nothing as under way.
	c := newClient(t, h, Options{})
	if err := c.Fetch(t.Context(), request(blockdev.Prefetch, chunks), discard); err != nil {
		t.Error(err)
	}
	if s.admit.now != [kinds]int{} {
		t.Errorf("still counted: %v", s.admit.now)
	}
}

// A store that returns nonsense is found out before it is sent.
func TestBadStore(t *testing.T) {
	st, chunks := newStore(t, false, text(1, 100), text(2, 100), text(3, 100))
	st.chunks[chunks[0].Digest] = Encoded{}
	st.chunks[chunks[1].Digest] = Encoded{Data: make([]byte, blockdev.MaxChunk+1), Length: blockdev.MaxChunk + 1}
	st.chunks[chunks[2].Digest] = Encoded{Data: []byte("not zstd"), Zstd: true, Length: 100}
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st})
	c := newClient(t, h, Options{Raw: true})
	for i := range chunks {
		if err := c.Fetch(t.Context(), request(blockdev.Demand, chunks[i:i+1]), discard); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("chunk %d: %v, want ErrCorrupt", i, err)
		}
	}
	if st.lent.Load() != 0 {
		t.Errorf("%d chunks not released", st.lent.Load())
	}
}
