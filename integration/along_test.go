package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/exchange"
)

// front is a registry of images of one layer each, whose blobs come as the test says.
type front struct {
	addr string

	mu    sync.Mutex
	paths map[string]http.HandlerFunc
}

func newFront(t *testing.T) *front {
	t.Helper()
	f := &front{paths: map[string]http.HandlerFunc{"/v2/": func(http.ResponseWriter, *http.Request) {}}}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		h := f.paths[r.URL.Path]
		f.mu.Unlock()
		if h == nil {
			h = http.NotFound
		}
		h(w, r)
	}))
	t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
	})
	f.addr = srv.Listener.Addr().String()
	return f
}

// give serves a document.
func give(b lab.Blob) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", b.MediaType)
		w.Header().Set("Docker-Content-Digest", b.Digest)
		w.Header().Set("Content-Length", fmt.Sprint(b.Size))
		_, _ = w.Write(b.Data) // to a HEAD, nothing
	}
}

// push adds an image of one layer, whose blob h gives, and returns its reference.
func (f *front) push(t *testing.T, repository string, l lab.Blob, h http.HandlerFunc) string {
	t.Helper()
	config := lab.NewBlob(lab.MediaTypeConfig, must(json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "rootfs": map[string]any{"type": "layers", "diff_ids": []string{l.DiffID}},
	}))(t))
	manifest := lab.NewBlob(lab.MediaTypeManifest, must(json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": lab.MediaTypeManifest, "config": config, "layers": []lab.Blob{l},
	}))(t))
	f.mu.Lock()
	defer f.mu.Unlock()
	root := "/v2/" + repository
	f.paths[root+"/manifests/v1"], f.paths[root+"/manifests/"+manifest.Digest] = give(manifest), give(manifest)
	f.paths[root+"/blobs/"+config.Digest], f.paths[root+"/blobs/"+l.Digest] = give(config), h
	return f.addr + "/" + repository + ":v1"
}

// trickle sends the beginning of a blob, and then a byte now and then, until gone ends.
func trickle(began *sync.WaitGroup, gone <-chan struct{}, l lab.Blob) http.HandlerFunc {
	first := sync.OnceFunc(began.Done)
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(l.Size))
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for _, b := range l.Data {
			if _, err := w.Write([]byte{b}); err != nil {
				return
			}
			if err := http.NewResponseController(w).Flush(); err != nil {
				return
			}
			first()
			select {
			case <-gone:
				panic(http.ErrAbortHandler)
			case <-r.Context().Done():
				return
			case <-tick.C:
			}
		}
	}
}

// supersite is a site without a node.
func supersite(t *testing.T) *site {
	t.Helper()
	s := &site{Lab: newLab(t)}
	s.registry = must(s.StartRegistry(t.Context(), "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(t.Context(), "super", ""))(t)
	return s
}

func fetchIndexes(ctx context.Context, c *exchange.Client, ref string) error {
	_, err := c.FetchIndexes(ctx, image.Request{Ref: ref})
	return err
}

// joined is a client whose membership has come through, which it shows with ref.
func joined(t *testing.T, s *site, ref string) *exchange.Client {
	t.Helper()
	_, _, c := member(t, s)
	noError(t, lab.WaitFor(t.Context(), "the image's indexes", time.Minute, func() error { return fetchIndexes(t.Context(), c, ref) }))
	return c
}

// TestDrillSupernodeWaits: requests that wait for one image keep nobody from the
// indexes of another, which is stored. With and without them by turns, so that what else the
// machine does slows down both.
func TestDrillSupernodeWaits(t *testing.T) {
	const perPeer = 8 // that a supernode takes of one
	peers, turns, samples := 12, 1, 200
	if isDrill() {
		peers, turns, samples = 250, 5, 2000
	}
	s := supersite(t)
	f := newFront(t)
	small, _ := noisy(t, "here", 8000, 1)
	stored := s.push(t, "stored", small)
	c := joined(t, s, stored)
	times := func() (took []float64) {
		t.Helper()
		for range samples {
			start := time.Now()
			noError(t, fetchIndexes(t.Context(), c, stored))
			took = append(took, time.Since(start).Seconds())
		}
		return took
	}
	var waiters []*exchange.Client
	for range peers {
		waiters = append(waiters, joined(t, s, stored))
	}
	var idle, busy []float64
	var left atomic.Int64
	for turn := range turns {
		wait(t.Context(), 2*time.Second)
		idle = append(idle, times()...) // with all of them connected
		cold, _ := noisy(t, "cold", uint64(8001+turn), 1)
		gone := make(chan struct{})
		var began, wg sync.WaitGroup
		began.Add(1)
		slow := trickle(&began, gone, cold)
		waited := f.push(t, fmt.Sprint("waited", turn), cold, func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-gone:
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(cold.Data))
			default:
				slow(w, r)
			}
		})
		ctx, cancel := context.WithCancel(t.Context())
		for _, w := range waiters {
			for range perPeer {
				wg.Go(func() {
					if err := fetchIndexes(ctx, w, waited); ctx.Err() == nil {
						left.Add(1)
						t.Logf("did not wait: %v", err)
					}
				})
			}
		}
		began.Wait()
		wait(ctx, 2*time.Second) // until all have asked
		busy = append(busy, times()...)
		cancel()
		wg.Wait()
		close(gone)
		// The ingest goes on without them, and is over before the next turn.
		noError(t, lab.WaitFor(t.Context(), "the ingest", time.Minute, func() error { return fetchIndexes(t.Context(), c, waited) }))
	}
	p99 := func(took []float64) float64 {
		slices.Sort(took)
		return took[len(took)*99/100]
	}
	n := peers * perPeer
	count(t, fmt.Sprintf("index of a stored image while %d requests wait: requests that did not wait", n), int(left.Load()))
	figure(t, fmt.Sprintf("index of a stored image while %d requests wait for one that is being ingested: p99 against idle", n), "x", report.AtMost, 2, p99(busy)/p99(idle))
	figure(t, "index of a stored image, idle: p99", "ms", "", 0, p99(idle)*1000)
}

// TestDrillSupernodeTrickle: layers that trickle from one registry cost those of
// another next to nothing.
func TestDrillSupernodeTrickle(t *testing.T) {
	megabytes, n := 10, 1
	if isDrill() {
		megabytes, n = 100, 3
	}
	s := supersite(t)
	f := newFront(t)
	here, _ := noisy(t, "here", 8100, 1)
	c := joined(t, s, s.push(t, "here", here))
	seed := uint64(8101)
	ingest := func() float64 {
		t.Helper()
		l, _ := noisy(t, "layer", seed, megabytes)
		ref := s.push(t, fmt.Sprint("layer", seed), l)
		seed++
		start := time.Now()
		noError(t, fetchIndexes(t.Context(), c, ref))
		return time.Since(start).Seconds()
	}
	ingest() // warm
	var ratios []float64
	for i := range n {
		alone := ingest()
		gone := make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		var began, wg sync.WaitGroup
		for j := range 4 {
			l, _ := noisy(t, "slow", uint64(8200+4*i+j), 9) // more than a small layer
			began.Add(1)
			ref := f.push(t, fmt.Sprintf("slow%d-%d", i, j), l, trickle(&began, gone, l))
			wg.Go(func() {
				if err := fetchIndexes(ctx, c, ref); err == nil {
					t.Error("a layer that trickles has come")
				}
			})
		}
		began.Wait()
		ratios = append(ratios, ingest()/alone)
		cancel()
		close(gone)
		wg.Wait()
	}
	figure(t, fmt.Sprintf("ingest of a %d MB layer while four layers trickle from another registry, against alone", megabytes), "x", report.AtMost, 1.2, ratios...)
}

// synthetic is a layer of many gigabytes that takes little of anybody's memory: some
// content, again and again, compressed once. A gzip stream may have many members.
type synthetic struct {
	members [][]byte // compressed
	blob    lab.Blob // without data
}

// unit is how long the content is that repeats, and how much of it one file has.
const (
	unit       = 256 << 20
	unitOfFile = 4
)

func newSynthetic(t *testing.T, gigabytes int) *synthetic {
	t.Helper()
	// Words, so that it compresses, in an order that does not repeat within the unit.
	rnd := rand.New(rand.NewPCG(uint64(gigabytes), 1))
	var words [16][64]byte
	for i := range words {
		for j := range words[i] {
			words[i][j] = byte(rnd.Uint32())
		}
	}
	content := make([]byte, 0, unit)
	for len(content) < unit {
		r := rnd.Uint64()
		for range 16 {
			content = append(content, words[r&15][:]...)
			r >>= 4
		}
	}
	s := &synthetic{}
	diff, blob := sha256.New(), sha256.New()
	add := func(raw, member []byte) {
		diff.Write(raw)
		blob.Write(member)
		s.members = append(s.members, member)
		s.blob.Size += int64(len(member))
	}
	packed := gzipMember(t, content)
	for i := range gigabytes {
		var b bytes.Buffer
		noError(t, tar.NewWriter(&b).WriteHeader(&tar.Header{Name: fmt.Sprint("file", i), Mode: 0o644, Size: unit * unitOfFile, ModTime: mtime, Format: tar.FormatPAX}))
		add(b.Bytes(), gzipMember(t, b.Bytes()))
		for range unitOfFile {
			add(content, packed)
		}
	}
	end := make([]byte, 1024)
	add(end, gzipMember(t, end))
	s.blob.MediaType, s.blob.Digest, s.blob.DiffID = lab.MediaTypeLayerGzip, digestOf(blob), digestOf(diff)
	return s
}

func digestOf(h hash.Hash) string { return fmt.Sprintf("sha256:%x", h.Sum(nil)) }

func gzipMember(t *testing.T, raw []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := must(gzip.NewWriterLevel(&b, gzip.BestSpeed))(t)
	_, err := z.Write(raw)
	noError(t, errors.Join(err, z.Close()))
	return b.Bytes()
}

func (s *synthetic) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Length", fmt.Sprint(s.blob.Size))
	for _, m := range s.members {
		if _, err := io.Copy(w, bytes.NewReader(m)); err != nil {
			return
		}
	}
}

// TestDrillSupernodeHuge: a supernode's memory while it takes in a layer that is much
// larger.
func TestDrillSupernodeHuge(t *testing.T) {
	gigabytes := 1
	if isDrill() {
		gigabytes = 100
	}
	if n := os.Getenv("SHOAL_HUGE_GIB"); n != "" {
		gigabytes = must(strconv.Atoi(n))(t)
	}
	s := supersite(t)
	f := newFront(t)
	here, _ := noisy(t, "here", 8300, 1)
	c := joined(t, s, s.push(t, "here", here))
	l := newSynthetic(t, gigabytes)
	ref := f.push(t, "huge", l.blob, l.serve)
	start := time.Now()
	// A client gives up before a hundred gigabytes have come; the ingest goes on.
	noError(t, lab.WaitFor(t.Context(), "the layer", time.Hour, func() error { return fetchIndexes(t.Context(), c, ref) }))
	took := time.Since(start)
	_, peak, err := s.supernode.RSS()
	noError(t, err)
	figure(t, fmt.Sprintf("ingest of a synthetic layer of %d GiB: peak RSS of the supernode", gigabytes), "MiB", report.AtMost, 400, float64(peak>>20))
	figure(t, fmt.Sprintf("ingest of a synthetic layer of %d GiB", gigabytes), "s", "", 0, took.Seconds())
}
