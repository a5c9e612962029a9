package ingest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/blockdev/layer"
	"github.com/shoalfs/shoal/supernode/store"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		childMain(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

// makeTar makes a tar of about size bytes, half of it compressible.
func makeTar(t testing.TB, seed uint64, size int) []byte {
	t.Helper()
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; b.Len() < size; i++ {
		data := make([]byte, 1000+i*7919%90000)
		_, err := io.ReadFull(r, data[:len(data)/2])
		h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("dir/%d/file", i), Mode: 0o644, Size: int64(len(data)), ModTime: time.Unix(int64(i), 0)}
		err = errors.Join(err, w.WriteHeader(h))
		if _, werr := w.Write(data); err != nil || werr != nil {
			t.Fatal(err, werr)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	// Two members, as eStargz has many.
	for _, part := range [][]byte{b[:len(b)/2], b[len(b)/2:]} {
		w.Reset(&out)
		if _, err := w.Write(part); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return out.Bytes()
}

func zstded(t testing.TB, b []byte) []byte {
	t.Helper()
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	skip := []byte{0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'a', 'b', 'c'}
	out := append([]byte(nil), skip...)
	out = append(out, e.EncodeAll(b[:len(b)/3], nil)...)
	out = append(out, skip...)
	return append(out, e.EncodeAll(b[len(b)/3:], nil)...)
}

// registry serves blobs under /<hex>, with faults.
type registry struct {
	*httptest.Server
	mu    sync.Mutex
	blobs map[string][]byte
	// fault may write an answer itself (true) or change how much of the body is
	// sent before the connection is cut.
	fault    func(w http.ResponseWriter, r *http.Request, body []byte) (done bool, send int)
	requests atomic.Int64
	sent     atomic.Int64
	noRange  atomic.Bool
}

func newRegistry(t testing.TB) *registry {
	g := &registry{blobs: map[string][]byte{}}
	g.Server = httptest.NewServer(g)
	t.Cleanup(g.Close)
	return g
}

func (g *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.requests.Add(1)
	g.mu.Lock()
	body, ok := g.blobs[strings.TrimPrefix(r.URL.Path, "/")]
	fault := g.fault
	g.mu.Unlock()
	if !ok {
		http.NotFound(w, r)
		return
	}
	status := http.StatusOK
	if v := r.Header.Get("Range"); v != "" && !g.noRange.Load() {
		from, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(v, "bytes="), "-"))
		if err != nil || from >= len(body) {
			http.Error(w, "range", http.StatusRequestedRangeNotSatisfiable)
			return
		}
		body, status = body[from:], http.StatusPartialContent
	}
	send := len(body)
	if fault != nil {
		var done bool
		if done, send = fault(w, r, body); done {
			return
		}
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	n, _ := w.Write(body[:min(send, len(body))])
	g.sent.Add(int64(n))
	if n < len(body) {
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
}

// statusError is what a registry client makes of a refusal.
type statusError struct {
	status int
	after  time.Duration
}

func (e statusError) Error() string             { return fmt.Sprintf("HTTP %d", e.status) }
func (e statusError) RetryAfter() time.Duration { return e.after }
func (e statusError) Unwrap() error {
	switch e.status {
	case http.StatusUnauthorized:
		return blockdev.ErrUnauthorized
	case http.StatusNotFound:
		return blockdev.ErrNotFound
	case http.StatusTooManyRequests:
		return ErrLimited
	}
	return blockdev.ErrUnavailable
}

// opener is a plain registry client, one connection per request.
func opener(base string, d blockdev.Digest) Open {
	return func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/"+d.Hex(), nil)
		if err != nil {
			return nil, err
		}
		if offset > 0 {
			req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		}
		req.Close = true
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode >= 300 {
			resp.Body.Close()
			s, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
			return nil, statusError{resp.StatusCode, time.Duration(s) * time.Second}
		}
		if offset > 0 && resp.StatusCode == http.StatusOK {
			if _, err := io.CopyN(io.Discard, resp.Body, offset); err != nil {
				resp.Body.Close()
				return nil, err
			}
		}
		return resp.Body, nil
	}
}

// add serves blob and describes it as the layer that holds diff.
func (g *registry) add(blob, diff []byte, mediaType string) Layer {
	d := blockdev.Sum(blob)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.blobs[d.Hex()] = blob
	return Layer{
		Ref: "registry.example/test:1", Digest: d, Size: int64(len(blob)), MediaType: mediaType,
		DiffID: blockdev.Sum(diff), Host: "registry.example", Origin: "registry.example/x/y", Open: opener(g.URL, d),
	}
}

const gzipType = "application/vnd.oci.image.layer.v1.tar+gzip"

type fixture struct {
	dir string
	st  *store.Store
	in  *Ingester
	reg *registry
}

func newFixture(t testing.TB, cfg Config) *fixture {
	t.Helper()
	f := &fixture{dir: t.TempDir(), reg: newRegistry(t)}
	f.open(t, cfg)
	return f
}

func (f *fixture) open(t testing.TB, cfg Config) {
	t.Helper()
	if cfg.Store == nil {
		st, err := store.Open(store.Config{Dir: filepath.Join(f.dir, "store")})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { st.Close() })
		cfg.Store = st
	}
	f.st = cfg.Store
	cfg.SpoolDir = filepath.Join(f.dir, "spool")
	if cfg.BackOff == 0 {
		cfg.BackOff = time.Microsecond
	}
	in, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	f.in = in
}

func (f *fixture) spoolFiles(t testing.TB) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(f.dir, "spool", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// checkStored proves that the store gives the whole diff back.
func checkStored(t testing.TB, st *store.Store, l Layer, diff []byte) {
	t.Helper()
	rec, err := st.Layer(l.Digest)
	if err != nil || rec.DiffID != l.DiffID || rec.Size != l.Size || len(rec.Origins) != 1 || rec.Origins[0] != l.Origin {
		t.Fatalf("record %+v, %v", rec, err)
	}
	enc, err := st.Index(t.Context(), l.DiffID)
	if err != nil {
		t.Fatal(err)
	}
	ix, err := index.Decode(enc)
	if err != nil {
		t.Fatal(err)
	}
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	get := func(ctx context.Context, d blockdev.Digest) ([]byte, error) {
		c, err := st.Chunk(ctx, d)
		if err != nil || !c.Zstd {
			return c.Data, err
		}
		return dec.DecodeAll(c.Data, nil)
	}
	masked := make([]byte, ix.DiffSize)
	for _, c := range ix.Chunks {
		b, err := get(t.Context(), c.Digest)
		if err != nil || len(b) != int(c.Length) {
			t.Fatalf("chunk: %d bytes, %v", len(b), err)
		}
		copy(masked[c.Offset:], b)
	}
	h := sha256.New()
	err = layer.Restore(t.Context(), ix, bytes.NewReader(masked), func(ctx context.Context, p blockdev.Piece) ([]byte, error) {
		return get(ctx, p.Digest)
	}, h)
	if err != nil {
		t.Fatal(err)
	}
	if blockdev.Digest(h.Sum(nil)) != blockdev.Sum(diff) {
		t.Fatal("the stored diff is another one")
	}
}

// checkAbsent proves that nothing of a failed layer is visible.
func checkAbsent(t testing.TB, st *store.Store, l Layer) {
	t.Helper()
	if _, err := st.Layer(l.Digest); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("layer: %v, want not found", err)
	}
	if s := st.Stats(); s.Diffs != 0 || s.Layers != 0 {
		t.Errorf("the store has %d diffs and %d layers", s.Diffs, s.Layers)
	}
}
