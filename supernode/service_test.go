package supernode

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

var amd64 = image.Platform{OS: "linux", Architecture: "amd64"}

var alice = image.Credential{Username: "alice", Secret: "secret-of-alice"}

func onlyAliceReads(user, _ string) bool { return user == alice.Username }

var users = map[string]string{alice.Username: alice.Secret}

// start opens a supernode that ends with the test.
func start(t testing.TB, change ...func(*Config)) *Supernode {
	t.Helper()
	cfg := Config{Dir: filepath.Join(t.TempDir(), "data"), Registry: registry.Config{Timeout: 10 * time.Second, Stall: 5 * time.Second}}
	for _, f := range change {
		f(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// clock is a time that stands still, for what remembers answers and failures.
type clock struct {
	start time.Time
	ahead atomic.Int64
}

func newClock() *clock { return &clock{start: time.Now()} }

func (c *clock) use(cfg *Config) { cfg.now = c.now }

func (c *clock) now() time.Time { return c.start.Add(time.Duration(c.ahead.Load())) }

func (c *clock) pass(d time.Duration) { c.ahead.Add(int64(d)) }

func at(dir string) func(*Config) { return func(c *Config) { c.Dir = dir } }

func trust(hosts ...string) func(*Config) { return func(c *Config) { c.TrustedRegistries = hosts } }

func request(reg registrytest.Target, ref string, c image.Credential) image.Request {
	return image.Request{Ref: reg.Host + "/" + ref, Platform: amd64, Credential: c}
}

var nobody = image.Credential{}

// warm makes s have an image, and tells progress how that goes.
func warm(t testing.TB, s *Supernode, req image.Request, progress func(image.Progress)) error {
	req.Progress = progress
	_, err := s.FetchIndexes(t.Context(), req)
	return err
}

// wantImage fails unless img has these layers, each with its index, and the
// supernode has every chunk of them.
func wantImage(t testing.TB, s *Supernode, img *image.Image, layers ...registrytest.Layer) {
	t.Helper()
	if len(img.Layers) != len(layers) {
		t.Fatalf("%d layers, want %d", len(img.Layers), len(layers))
	}
	for i, l := range layers {
		got := img.Layers[i]
		if got.DiffID != l.DiffID || got.Digest != blockdev.Sum(l.Blob) || got.Size != int64(len(l.Blob)) {
			t.Errorf("layer %d: %v %v %d", i, got.DiffID, got.Digest, got.Size)
		}
		ix, err := index.Decode(got.Index)
		if err != nil {
			t.Fatalf("layer %d: index: %v", i, err)
		}
		if ix.DiffID != l.DiffID {
			t.Errorf("layer %d: its index is of %s", i, ix.DiffID)
		}
		chunks := ix.Chunks
		for _, h := range ix.Headers {
			chunks = append(chunks, blockdev.Chunk{Length: h.Length, Digest: h.Digest})
		}
		n := 0
		err = s.Fetch(t.Context(), blockdev.Request{Diff: ix.DiffID, Chunks: chunks}, func(i int, data []byte) error {
			n++
			if blockdev.Sum(data) != chunks[i].Digest {
				t.Errorf("chunk %d has wrong bytes", i)
			}
			return nil
		})
		if err != nil || n != len(chunks) {
			t.Errorf("layer %d: %d of %d chunks: %v", i, n, len(chunks), err)
		}
	}
}

func wantErr(t testing.TB, err, kind error, parts ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error %v, want one that is %q", err, kind)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not mention %q", err, p)
		}
	}
	if strings.Contains(err.Error(), alice.Secret) {
		t.Errorf("error %q holds the secret", err)
	}
}

// TestRealRegistry runs the whole way against docker-registry, with two nodes at
// once on a cold supernode, and again when it is warm.
func TestRealRegistry(t *testing.T) {
	reg := registrytest.StartReal(t, true)
	layers := []registrytest.Layer{registrytest.GzipLayer(t, "a", 700_000, 1), registrytest.GzipLayer(t, "b", 3, 2)}
	reg.Push(t, "team/app", "v1", layers...)
	s := start(t)
	cred := image.Credential{Username: reg.User, Secret: reg.Password}
	for range 2 {
		var wg sync.WaitGroup
		for i := range 2 {
			wg.Go(func() {
				img, err := s.FetchIndexesFor(t.Context(), fmt.Sprint("node", i), request(reg, "team/app:v1", cred))
				if err != nil {
					t.Error(err)
					return
				}
				wantImage(t, s, img, layers...)
			})
		}
		wg.Wait()
	}
	_, err := s.FetchIndexesFor(t.Context(), "node9", request(reg, "team/app:v1", nobody))
	wantErr(t, err, blockdev.ErrUnauthorized, reg.Host+"/team/app:v1")
}

// TestOnce: however many ask, and though the registry cuts its connections, each
// layer is asked for once, and its bytes come once.
func TestOnce(t *testing.T) {
	f := registrytest.NewFake(t)
	layers := []registrytest.Layer{registrytest.GzipLayer(t, "a", 900_000, 1), registrytest.GzipLayer(t, "b", 400_000, 2), registrytest.GzipLayer(t, "c", 10, 3)}
	f.Push(t, "app", "v1", layers...)
	f.Push(t, "other", "v1", layers[0], registrytest.GzipLayer(t, "d", 10, 4))
	f.Forget()
	reg := prometheus.NewPedanticRegistry()
	s := start(t, func(c *Config) { c.Registerer = reg })
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			img, err := s.FetchIndexesFor(t.Context(), fmt.Sprint("node", i), request(f.Target, []string{"app:v1", "other:v1"}[i%2], nobody))
			if err != nil {
				t.Error(err)
				return
			}
			if i%2 == 0 {
				wantImage(t, s, img, layers...)
			}
		})
	}
	wg.Wait()
	total := 0
	for _, l := range layers {
		total += len(l.Blob)
		if n := len(f.Requests("GET", "/blobs/"+blockdev.Sum(l.Blob).String())); n != 1 {
			t.Errorf("%d requests for a layer, want 1", n)
		}
	}
	got := gather(t, reg)
	if n := got["shoal_supernode_registry_bytes_total"]; n < float64(total) || n > float64(total)+20_000 {
		t.Errorf("%v bytes from the registry for %d of layers", n, total)
	}
	if got["shoal_supernode_image_requests_total{ok}"] != 20 || got["shoal_supernode_layer_ingests_total{ok}"] != 4 ||
		got["shoal_supernode_store_layers"] != 4 || got["shoal_supernode_chunk_bytes_total"] == 0 {
		t.Errorf("metrics: %v", got)
	}
	// Warm, and even checked again, it costs no layer bytes.
	f.Forget()
	if _, err := s.FetchIndexesFor(t.Context(), "late", request(f.Target, "app:v1", nobody)); err != nil {
		t.Error(err)
	}
	if n := f.Requests(); len(n) != 0 {
		t.Errorf("a warm image cost the registry %v", n)
	}
}

func gather(t *testing.T, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	fams, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range fams {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				if !slices.Contains([]string{"outcome", "of", "state"}, l.GetName()) {
					t.Errorf("metric %s has the label %s", name, l.GetName())
				}
				name += "{" + l.GetValue() + "}"
			}
			out[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return out
}

// TestOddImages: layers that repeat, that are empty, and none at all.
func TestOddImages(t *testing.T) {
	f := registrytest.NewFake(t)
	empty := registrytest.Compress(t, make([]byte, 1024)) // a tar that ends at once
	none := registrytest.Compress(t, nil)
	a := registrytest.GzipLayer(t, "a", 100_000, 1)
	s := start(t)
	for i, layers := range [][]registrytest.Layer{{}, {empty}, {a, a}, {a, empty, a, empty, none}} {
		tag := fmt.Sprint("odd:v", i)
		f.Push(t, "odd", fmt.Sprint("v", i), layers...)
		img, err := s.FetchIndexesFor(t.Context(), "p", request(f.Target, tag, nobody))
		if err != nil {
			t.Errorf("%s: %v", tag, err)
			continue
		}
		wantImage(t, s, img, layers...)
	}
}

func TestHave(t *testing.T) {
	f := registrytest.NewFake(t)
	a, b := registrytest.GzipLayer(t, "a", 1000, 1), registrytest.GzipLayer(t, "b", 1000, 2)
	f.Push(t, "app", "v1", a, b)
	s := start(t)
	req := request(f.Target, "app:v1", nobody)
	req.Have = []blockdev.Digest{blockdev.Sum(a.Blob)}
	img, err := s.FetchIndexesFor(t.Context(), "p", req)
	if err != nil {
		t.Fatal(err)
	}
	if img.Layers[0].Index != nil || img.Layers[1].Index == nil {
		t.Error("an index for a layer that the node has, or none for one that it has not")
	}
	if img.Layers[0].DiffID != a.DiffID {
		t.Error("a layer that the node has lost its facts")
	}
}

// TestAllOrNothing: one broken layer, and no index is handed out; what was good
// is not fetched again when the registry is repaired.
func TestAllOrNothing(t *testing.T) {
	f := registrytest.NewFake(t)
	good, bad := registrytest.GzipLayer(t, "a", 1000, 1), registrytest.GzipLayer(t, "b", 1000, 2)
	f.Push(t, "app", "v1", good, bad)
	damaged := append([]byte(nil), bad.Blob...)
	damaged[len(damaged)/2] ^= 1
	f.SetBlob("app", blockdev.Sum(bad.Blob), damaged)
	clock := newClock()
	s := start(t, clock.use)
	img, err := s.FetchIndexesFor(t.Context(), "p", request(f.Target, "app:v1", nobody))
	wantErr(t, err, blockdev.ErrCorrupt, "app:v1", blockdev.Sum(bad.Blob).String())
	if img != nil {
		t.Error("an image with an error")
	}
	if n := len(s.stock.Images()); n != 0 {
		t.Errorf("%d images are said to be stored", n)
	}
	f.SetBlob("app", blockdev.Sum(bad.Blob), bad.Blob)
	clock.pass(time.Minute + time.Second)
	if img, err = s.FetchIndexesFor(t.Context(), "p", request(f.Target, "app:v1", nobody)); err != nil {
		t.Fatal(err)
	}
	wantImage(t, s, img, good, bad)
	if n := len(f.Requests("GET", blockdev.Sum(good.Blob).String())); n != 1 {
		t.Errorf("the good layer was fetched %d times", n)
	}
	if got := s.stock.Images(); len(got) != 1 || got[0].Ref != f.Host+"/app:v1" || len(got[0].Layers) != 2 {
		t.Errorf("%+v", got)
	}
}

// TestRefusedLayerIsNotFetchedEachTime: a broken layer costs the registry less and less,
// however often its image is asked for.
func TestRefusedLayerIsNotFetchedEachTime(t *testing.T) {
	reg := registrytest.NewFake(t)
	l := registrytest.GzipLayer(t, "a", 100_000, 1)
	l.DiffID = blockdev.Sum([]byte("another"))
	reg.Push(t, "app", "v1", l)
	clock := newClock()
	s := start(t, clock.use)
	for range 60 { // minutes
		_, err := s.FetchIndexesFor(t.Context(), "p", request(reg.Target, "app:v1", nobody))
		if !errors.Is(err, blockdev.ErrCorrupt) {
			t.Fatal(err)
		}
		clock.pass(time.Minute + time.Second)
	}
	if n := len(reg.Requests("GET", blockdev.Sum(l.Blob).String())); n != 6 {
		t.Errorf("fetched %d times within an hour, want 6", n)
	}
}

// TestImpatient: who leaves does not stop the work, and close does.
func TestImpatient(t *testing.T) {
	f := registrytest.NewFake(t)
	l := registrytest.GzipLayer(t, "a", 100_000, 1)
	f.Push(t, "app", "v1", l)
	reached, goOn := make(chan struct{}), make(chan struct{})
	f.SetHook(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, blockdev.Sum(l.Blob).String()) {
			close(reached)
			<-goOn
		}
		return false
	})
	s := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := s.FetchIndexesFor(ctx, "p", request(f.Target, "app:v1", nobody))
		failed <- err
	}()
	<-reached
	cancel()
	wantErr(t, <-failed, context.Canceled, "app:v1")
	close(goOn)
	img, err := s.FetchIndexesFor(t.Context(), "p", request(f.Target, "app:v1", nobody))
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, s, img, l)
	if n := len(f.Requests("GET", blockdev.Sum(l.Blob).String())); n != 1 {
		t.Errorf("the layer was fetched %d times", n)
	}
}

func TestCloseEndsWork(t *testing.T) {
	f := registrytest.NewFake(t)
	l := registrytest.GzipLayer(t, "a", 100_000, 1)
	f.Push(t, "app", "v1", l)
	reached := make(chan struct{})
	f.SetHook(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, blockdev.Sum(l.Blob).String()) {
			close(reached)
			<-r.Context().Done()
			return true
		}
		return false
	})
	s, err := New(Config{Dir: filepath.Join(t.TempDir(), "data")})
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	go func() {
		_, err := s.FetchIndexesFor(t.Context(), "p", request(f.Target, "app:v1", nobody))
		failed <- err
	}()
	<-reached
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wantErr(t, <-failed, blockdev.ErrUnavailable, "app:v1", "stopping")
	_, err = s.FetchIndexesFor(t.Context(), "p", request(f.Target, "app:v1", nobody))
	wantErr(t, err, blockdev.ErrUnavailable, "stopping")
}

// TestRestartGoesOn: what was fetched before a restart is not fetched again.
func TestRestartGoesOn(t *testing.T) {
	f := registrytest.NewFake(t)
	l := registrytest.GzipLayer(t, "a", 2<<20, 1)
	f.Push(t, "app", "v1", l)
	half := len(l.Blob) / 2
	sent := make(chan struct{})
	var once sync.Once
	f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, blockdev.Sum(l.Blob).String()) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(l.Blob)))
		_, _ = w.Write(l.Blob[:half])
		_ = http.NewResponseController(w).Flush()
		once.Do(func() { close(sent) })
		<-r.Context().Done()
		return true
	})
	cfg := Config{Dir: filepath.Join(t.TempDir(), "data")}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	enough := make(chan struct{})
	go func() {
		var once sync.Once
		failed <- warm(t, s, request(f.Target, "app:v1", nobody), func(p image.Progress) {
			if p.Stage == image.StageFetching && p.Done >= int64(half)*3/4 {
				once.Do(func() { close(enough) })
			}
		})
	}()
	<-sent
	<-enough
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wantErr(t, <-failed, blockdev.ErrUnavailable, "stopping")
	var from int
	f.SetHook(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, blockdev.Sum(l.Blob).String()) {
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err != nil {
				t.Errorf("range %q", r.Header.Get("Range"))
			}
		}
		return false
	})
	s = start(t, at(cfg.Dir))
	img, err := s.FetchIndexesFor(t.Context(), "p", request(f.Target, "app:v1", nobody))
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, s, img, l)
	if from < half*3/4 || from > half {
		t.Errorf("the rest was asked for from byte %d, %d had come", from, half)
	}
}

func TestWarm(t *testing.T) {
	f := registrytest.NewFake(t)
	a, b := registrytest.GzipLayer(t, "a", 3<<20, 1), registrytest.GzipLayer(t, "b", 10, 2)
	f.Push(t, "app", "v1", a, b)
	s := start(t)
	last := map[blockdev.Digest]image.Progress{}
	err := warm(t, s, request(f.Target, "app:v1", nobody), func(p image.Progress) {
		if q := last[p.Layer]; p.Done < q.Done || p.Total == 0 {
			t.Errorf("%+v after %+v", p, q)
		}
		last[p.Layer] = p
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []registrytest.Layer{a, b} {
		want := image.Progress{Layer: blockdev.Sum(l.Blob), Done: int64(len(l.Blob)), Total: int64(len(l.Blob)), Stage: image.StageStored}
		if got := last[want.Layer]; got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	wantErr(t, warm(t, s, request(f.Target, "app:none", nobody), nil), blockdev.ErrNotFound)
}

func TestBadConfig(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		cfg     Config
		mention string
	}{
		{Config{}, "no data directory"},
		{Config{Dir: filepath.Join(dir, "no", "parent")}, "no such file"},
		{Config{Dir: file}, "not a directory"},
		{Config{Dir: dir, AccessTTL: time.Hour, AccessGrace: time.Minute}, "AccessGrace (1m0s) is shorter"},
		{Config{Dir: dir, Quota: -1}, "negative"},
	} {
		s, err := New(tc.cfg)
		if err == nil {
			t.Errorf("%+v is accepted", tc.cfg)
			_ = s.Close()
			continue
		}
		if !strings.Contains(err.Error(), tc.mention) {
			t.Errorf("error %q does not mention %q", err, tc.mention)
		}
	}
	s := start(t)
	if err := s.Healthy(); err != nil {
		t.Error(err)
	}
}

// TestSource runs the conformance suite of blockdev.Source.
func TestSource(t *testing.T) {
	blockdevtest.TestSource(t, func(t *testing.T, data [][]byte) blockdev.Source {
		s := start(t)
		in, err := s.store.Begin(blockdev.Sum([]byte("suite")))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(in.Abort)
		for _, b := range data {
			if err := in.Put(t.Context(), blockdev.Sum(b), b); err != nil {
				t.Fatal(err)
			}
		}
		return s
	})
}

// logBuffer collects log output of several goroutines.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var _ io.Writer = (*logBuffer)(nil)
