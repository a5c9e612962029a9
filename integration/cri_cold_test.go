package integration

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// holdback is a registry in front of another one that does not begin to answer
// requests for a blob as long as it is held back.
type holdback struct {
	// Addr is host:port.
	Addr string

	proxy http.Handler
	asked chan struct{} // closed once a blob that is held has been asked for
	once  sync.Once
	open  chan struct{} // closed by release
	done  sync.Once

	held map[string]bool // by digest; as it was made
}

func newHoldback(t *testing.T, registry string, digests ...string) *holdback {
	t.Helper()
	h := &holdback{
		proxy: httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry}),
		asked: make(chan struct{}), open: make(chan struct{}), held: map[string]bool{},
	}
	for _, d := range digests {
		h.held[d] = true
	}
	server := httptest.NewServer(h)
	h.Addr = strings.TrimPrefix(server.URL, "http://")
	t.Cleanup(func() { h.release(); server.Close() })
	return h
}

// release lets all through from then on.
func (h *holdback) release() { h.done.Do(func() { close(h.open) }) }

func (h *holdback) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.held[r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]] && r.Method == http.MethodGet {
		h.once.Do(func() { close(h.asked) })
		select {
		case <-h.open:
		case <-r.Context().Done():
			return
		}
	}
	h.proxy.ServeHTTP(w, r)
}

// TestColdImageStopsNobody: while the bytes of a cold image do not come, and a
// garbage collection is due, pods of other images start and end, images are
// removed, and one that is at the supernode and shares its base with the cold one
// is pulled, lazily. The cold image's pull ends well once its bytes come.
func TestColdImageStopsNobody(t *testing.T) {
	eachContainerd(t, func(t *testing.T, v lab.ContainerdVersion) {
		s := newCRISite(t, v, "prepare_timeout = \"3s\"\n", nil) // the lab's own is longer
		// Whatever waits for the cold image waits longer than the test's patience.
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		guest := must(s.Guest())(t)
		cold := layer(t, file("cold", bigContent(7)))
		hold := newHoldback(t, s.registry.Addr, cold.Digest)
		at := func(repository string, layers ...lab.Blob) string {
			s.push(t, repository, append([]lab.Blob{guest}, layers...)...)
			return hold.Addr + "/" + repository + ":v1"
		}
		a, b := at("a", cold), at("b", layer(t, file("data", bigContent(2))))
		warm, old := at("warm", layer(t, file("data", bigContent(3)))), at("old", layer(t, file("data", bigContent(4))))
		must(s.Run(ctx, "shoal", "prefetch", "--control", s.supernode.Control, b))(t)
		noError(t, s.CRI.Pull(ctx, warm, nil))
		noError(t, s.CRI.Pull(ctx, old, nil))
		pod, _ := s.run(t, "before", warm, lab.PodOptions{})

		pulled := make(chan error, 1)
		go func() { pulled <- s.CRI.Pull(context.WithoutCancel(ctx), a, nil) }()
		select {
		case <-hold.asked:
		case err := <-pulled:
			t.Fatalf("the cold image's pull ended, and nobody had asked for its layer: %v", err)
		}
		// Removed images and an ended pod: a garbage collection each.
		collected := make(chan error, 1)
		go func() {
			_, err := s.Ctr(ctx, "-n", "k8s.io", "images", "rm", "--sync", old)
			collected <- err
		}()
		noError(t, pod.Remove(ctx))
		p := must(s.CRI.RunPod(ctx, "during", lab.PodOptions{}))(t)
		c := must(p.Start(ctx, "main", warm, "/guest", "pause"))(t)
		must(c.Exec(ctx, "/guest", "sum", "/data"))(t)
		noError(t, s.CRI.Pull(ctx, b, nil))
		if !s.isLazy(t, ctx, b) {
			t.Errorf("an image that is all at the supernode is not lazy while another one is cold: %s", logLine(t, s.node.Log, b))
		}
		c = must(p.Start(ctx, "b", b, "/guest", "pause"))(t)
		must(c.Exec(ctx, "/guest", "sum", "/data"))(t)
		noError(t, <-collected)
		select {
		case err := <-pulled:
			t.Errorf("the cold image's pull has ended without its bytes: %v", err)
		default:
		}
		hold.release()
		noError(t, <-pulled)
		c = must(p.Start(ctx, "a", a, "/guest", "pause"))(t)
		if got := must(c.Exec(ctx, "/guest", "cat", "/cold"))(t); got != bigContent(7) {
			t.Error("the cold image has other content than was pushed")
		}
		noError(t, p.Remove(ctx))
	})
}

// TestHeldPullIsProgress: an image's config that the mirror holds back for longer than
// CRI waits for progress does not end the pull, whichever way containerd pulls.
func TestHeldPullIsProgress(t *testing.T) {
	const timeout = 4 * time.Second
	held := func(t *testing.T, v lab.ContainerdVersion, local bool) {
		s := newCRISite(t, v, "", func(s *site, o *lab.ContainerdOptions) {
			o.Mirror, o.MirrorCA = s.node.Mirror, s.node.MirrorCA
			o.CRI.NoAnnotations, o.CRI.ProgressTimeout = local, timeout
		})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		cold := layer(t, file("cold", bigContent(7)))
		hold := newHoldback(t, s.registry.Addr, cold.Digest)
		s.push(t, "a", must(s.Guest())(t), cold)
		ref := hold.Addr + "/a:v1"
		began := time.Now()
		pulled := make(chan error, 1)
		go func() { pulled <- s.CRI.Pull(ctx, ref, nil) }()
		select {
		case err := <-pulled:
			t.Fatalf("the pull of an image whose indexes are waited for ended after %v: %v", time.Since(began), err)
		case <-time.After(9 * time.Second):
		}
		hold.release()
		noError(t, <-pulled)
		if !local && !s.isLazy(t, ctx, ref) { // a local pull does not say which image it is
			t.Errorf("the image is not lazy: %s", logLine(t, s.node.Log, ref))
		}
	}
	eachContainerd(t, func(t *testing.T, v lab.ContainerdVersion) {
		if v.ConfigVersion < 3 {
			held(t, v, false) // the only way that it has
			return
		}
		t.Run("transfer service", func(t *testing.T) { held(t, v, false) })
		t.Run("local", func(t *testing.T) { held(t, v, true) })
	})
}
