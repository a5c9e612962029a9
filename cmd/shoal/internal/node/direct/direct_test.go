package direct

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/snapshotter/images"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// registry is one layer in a registry in memory.
type registry struct {
	t     *testing.T
	built *blockdevtest.Layer
	layer images.Origin
	gz    []byte

	mu     sync.Mutex
	opened []int64 // offsets
	read   atomic.Int64
	// wrap stands between the blob and its reader; nil: nothing.
	wrap func(io.Reader) io.Reader
	err  error // of Open
}

func newRegistry(t *testing.T, files ...blockdevtest.File) *registry {
	t.Helper()
	l, err := blockdevtest.NewLayer(files...)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(l.Tar); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &registry{t: t, built: l, gz: b.Bytes(), layer: images.Origin{Ref: "registry.test/app:v1", Layer: images.Layer{Digest: blockdev.Sum(b.Bytes()), Size: int64(b.Len())}}}
}

func (r *registry) layers(diff blockdev.Digest) ([]images.Origin, error) {
	if diff != r.built.Index.DiffID {
		return nil, nil
	}
	return []images.Origin{r.layer}, nil
}

func (r *registry) open(_ context.Context, l images.Origin, offset int64) (io.ReadCloser, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opened = append(r.opened, offset)
	if r.err != nil {
		return nil, r.err
	}
	if l.Ref != r.layer.Ref || l.Layer != r.layer.Layer {
		r.t.Errorf("opened %+v", l)
	}
	var src io.Reader = bytes.NewReader(r.gz[offset:])
	if r.wrap != nil {
		src = r.wrap(src)
	}
	return io.NopCloser(io.TeeReader(src, writer(func(b []byte) { r.read.Add(int64(len(b))) }))), nil
}

func (r *registry) opens() []int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]int64(nil), r.opened...)
}

type writer func([]byte)

func (w writer) Write(b []byte) (int, error) { w(b); return len(b), nil }

func (r *registry) source(change func(*Config)) *Source {
	r.t.Helper()
	cfg := Config{Origins: r.layers, Open: r.open, BackOff: time.Millisecond}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { s.Close() })
	return s
}

// fetch asks for chunks [lo, hi) of the layer and checks what comes.
func (r *registry) fetch(ctx context.Context, s blockdev.Source, lo, hi int) error {
	chunks := r.built.Index.Chunks[lo:hi]
	n := 0
	err := s.Fetch(ctx, blockdev.Request{Diff: r.built.Index.DiffID, Priority: blockdev.Demand, Chunks: chunks}, func(i int, data []byte) error {
		n++
		if blockdev.Sum(data) != chunks[i].Digest {
			return fmt.Errorf("chunk %d: %w", i, blockdev.ErrCorrupt)
		}
		return nil
	})
	if err == nil && n != len(chunks) {
		return fmt.Errorf("nil, but %d of %d chunks", n, len(chunks))
	}
	return err
}

func bigLayer(t *testing.T) *registry {
	return newRegistry(t, blockdevtest.File{Name: "a", Data: blockdevtest.Bytes(1, 1<<20)},
		blockdevtest.File{Name: "b", Data: bytes.Repeat([]byte("text "), 20_000)}, blockdevtest.File{Name: "c", Data: blockdevtest.Bytes(2, 1<<19)})
}

// TestSource runs the conformance suite of blockdev.Source.
func TestSource(t *testing.T) {
	blockdevtest.TestDiffSource(t, func(t *testing.T, seed uint64, size int) (blockdev.Source, blockdev.Digest, []blockdev.Chunk) {
		r := newRegistry(t, blockdevtest.File{Name: "a", Data: blockdevtest.Bytes(seed, size)})
		return r.source(nil), r.built.Index.DiffID, r.built.Index.Chunks
	})
}

// TestFetch: all of a layer comes, chunks and header pieces, in one pass.
func TestFetch(t *testing.T) {
	r := bigLayer(t)
	s := r.source(nil)
	n := len(r.built.Index.Chunks)
	if err := r.fetch(t.Context(), s, 0, n); err != nil {
		t.Fatal(err)
	}
	if o := r.opens(); len(o) != 1 || o[0] != 0 {
		t.Errorf("opened at %v, want once", o)
	}
	var pieces []blockdev.Chunk
	off := r.built.Index.DiffSize
	for _, p := range r.built.Index.Headers {
		pieces = append(pieces, blockdev.Chunk{Offset: off, Length: p.Length, Digest: p.Digest})
		off += int64(p.Length)
	}
	got := 0
	err := s.Fetch(t.Context(), blockdev.Request{Diff: r.built.Index.DiffID, Chunks: pieces}, func(int, []byte) error { got++; return nil })
	if err != nil || got != len(pieces) {
		t.Errorf("%d of %d header pieces: %v", got, len(pieces), err)
	}
}

// TestSharedPass: many ask at once for what lies all over a layer, also for what
// has gone by when they come; few passes serve all.
func TestSharedPass(t *testing.T) {
	r := bigLayer(t)
	var kept atomic.Int64
	s := r.source(func(c *Config) {
		c.Keep = func(diff, d blockdev.Digest, data []byte) {
			if diff != r.built.Index.DiffID || blockdev.Sum(data) != d {
				t.Error("kept something else than it is said to be")
			}
			kept.Add(int64(len(data)))
		}
	})
	last := len(r.built.Index.Chunks) - 6 // what is behind nobody asks for
	var wg sync.WaitGroup
	for k := range 32 {
		wg.Go(func() {
			lo := last * ((k * 7) % 32) / 32
			if err := r.fetch(t.Context(), s, lo, lo+2); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if o := r.opens(); len(o) > 8 {
		t.Errorf("%d passes for 32 requests at once", len(o))
	}
	for deadline := time.Now().Add(10 * time.Second); kept.Load() == 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("nothing of what went by was offered to be kept")
		}
	}
}

// TestLate: what has gone by comes with the next pass, which begins at once if
// nobody waits for anything else.
func TestLate(t *testing.T) {
	r := bigLayer(t)
	hold := make(chan struct{})
	r.wrap = func(src io.Reader) io.Reader { // a pass stops after half of the blob
		first := len(r.opened) == 1
		return readerFunc(func(p []byte) (int, error) {
			if first && r.read.Load() > int64(len(r.gz)/2) {
				<-hold
			}
			return src.Read(p[:min(len(p), 4096)])
		})
	}
	s := r.source(nil)
	if err := r.fetch(t.Context(), s, 0, 1); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- r.fetch(t.Context(), s, 0, 2) }()
	close(hold)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if o := r.opens(); len(o) != 2 {
		t.Errorf("%d passes, want 2", len(o))
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestBrokenConnections: a connection that breaks now and then costs nothing but
// a new one, from where it ended; one that brings nothing ends the pass.
func TestBrokenConnections(t *testing.T) {
	r := bigLayer(t)
	part := int64(len(r.gz) / 5)
	r.wrap = func(src io.Reader) io.Reader { return io.LimitReader(src, part) }
	if err := r.fetch(t.Context(), r.source(nil), 0, len(r.built.Index.Chunks)); err != nil {
		t.Fatal(err)
	}
	if o := r.opens(); len(o) < 4 || o[1] != part {
		t.Errorf("opened at %v", o)
	}
	if n := r.read.Load(); n > int64(len(r.gz)) {
		t.Errorf("%d bytes read of a blob of %d", n, len(r.gz))
	}
	r.err = fmt.Errorf("refused: %w", blockdev.ErrUnavailable)
	err := r.fetch(t.Context(), r.source(nil), 0, 1)
	if !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("registry down: %v", err)
	}
	for _, part := range []string{"registry", r.layer.Ref, r.layer.Digest.String(), "refused"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("the error does not name %s: %v", part, err)
		}
	}
}

// TestHostile: a registry that sends something else, or too little or too much,
// gets nobody wrong bytes, and everybody an error.
func TestHostile(t *testing.T) {
	r := bigLayer(t)
	other := newRegistry(t, blockdevtest.File{Name: "a", Data: blockdevtest.Bytes(9, 1<<18)})
	good := r.gz
	cases := map[string]struct {
		gz   []byte
		want error
	}{
		"another layer": {append(bytes.Clone(other.gz), make([]byte, len(good)-len(other.gz))...), nil},
		"garbage":       {blockdevtest.Bytes(5, len(good)), nil},
		"bit flipped":   {flip(good, len(good)/3), nil},
		"short":         {good[:len(good)/2], blockdev.ErrUnavailable},
		"nothing":       {nil, blockdev.ErrUnavailable},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			r.gz = c.gz
			r.wrap = func(io.Reader) io.Reader { return nil }
			s := r.source(func(cfg *Config) {
				cfg.Open = func(_ context.Context, _ images.Origin, off int64) (io.ReadCloser, error) {
					return io.NopCloser(bytes.NewReader(c.gz[min(off, int64(len(c.gz))):])), nil
				}
			})
			err := r.fetch(t.Context(), s, 0, len(r.built.Index.Chunks))
			if err == nil || (c.want != nil && !errors.Is(err, c.want)) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

func flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 0xff
	return b
}

// TestEnds: a registry that never answers holds nobody longer than he wants to
// wait, and nothing when the source is closed; and a diff that no image has is
// not found.
func TestEnds(t *testing.T) {
	r := bigLayer(t)
	asked := make(chan struct{}, 10)
	s := r.source(func(c *Config) {
		c.Linger = time.Millisecond
		c.Open = func(ctx context.Context, _ images.Origin, _ int64) (io.ReadCloser, error) {
			asked <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("no more patience")
	done := make(chan error)
	go func() { done <- r.fetch(ctx, s, 0, 1) }()
	<-asked
	cancel(stop)
	if err := <-done; !errors.Is(err, stop) || !strings.Contains(err.Error(), r.layer.Digest.String()) {
		t.Errorf("given up: %v", err)
	}
	go func() { done <- r.fetch(t.Context(), s, 0, 1) }()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, blockdev.ErrUnavailable) {
		t.Errorf("closed: %v", err)
	}
	r.built.Index.DiffID = blockdev.Sum([]byte("another"))
	s = r.source(func(c *Config) {
		c.Origins = func(blockdev.Digest) ([]images.Origin, error) { return nil, nil }
	})
	if err := r.fetch(t.Context(), s, 0, 1); !errors.Is(err, blockdev.ErrNotFound) {
		t.Errorf("unknown diff: %v", err)
	}
}
