package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// newImage is a fake with one image in it.
func newImage(t *testing.T) (f *registrytest.Fake, req image.Request, layer registrytest.Layer) {
	f = registrytest.NewFake(t)
	layer = registrytest.GzipLayer(t, "file", 500_000, 7)
	d := f.Push(t, "app", "v1", layer)
	f.Forget()
	return f, image.Request{Ref: f.Host + "/app:v1", Manifest: d, Platform: amd64}, layer
}

func TestStatuses(t *testing.T) {
	for _, tc := range []struct {
		status int
		header string
		want   error
		after  time.Duration
		most   int // requests
	}{
		{403, "", blockdev.ErrUnauthorized, 0, 1},
		{404, "", blockdev.ErrNotFound, 0, 1},
		{429, "7", blockdev.ErrUnavailable, 7 * time.Second, 1},
		{429, "", blockdev.ErrUnavailable, 0, 3},
		{500, "", blockdev.ErrUnavailable, 0, 3},
		{503, "999999999", blockdev.ErrUnavailable, time.Hour, 1},
		{418, "", blockdev.ErrUnavailable, 0, 3},
	} {
		t.Run(fmt.Sprint(tc.status, tc.header), func(t *testing.T) {
			f, req, _ := newImage(t)
			f.SetHook(func(w http.ResponseWriter, _ *http.Request) bool {
				if tc.header != "" {
					w.Header().Set("Retry-After", tc.header)
				}
				registrytest.Fail(w, tc.status, "SOMECODE")
				return true
			})
			_, err := newClient(t).Resolve(t.Context(), req)
			wantError(t, err, tc.want, req.Ref)
			var e *registry.Error
			if !errors.As(err, &e) || e.RetryAfter() != tc.after {
				t.Errorf("%#v: want Retry-After %s", e, tc.after)
			}
			if tc.status != 404 && (e.Status != tc.status || e.Code != "SOMECODE" || e.Host != f.Host) {
				t.Errorf("facts are lost: %+v", e)
			}
			if n := len(f.Requests()); n > tc.most {
				t.Errorf("%d requests: %v", n, f.Requests())
			}
		})
	}
}

func TestComesBackAfterFailures(t *testing.T) {
	f, req, _ := newImage(t)
	var n atomic.Int32
	f.SetHook(func(w http.ResponseWriter, _ *http.Request) bool {
		if n.Add(1) <= 2 {
			registrytest.Fail(w, 502, "")
			return true
		}
		return false
	})
	if _, err := newClient(t).Resolve(t.Context(), req); err != nil {
		t.Fatal(err)
	}
}

func TestUnreachable(t *testing.T) {
	for _, host := range []string{"127.0.0.1:1", "no-such-registry.invalid:5000"} {
		_, err := newClient(t).Resolve(t.Context(), image.Request{Ref: host + "/app:v1", Platform: amd64})
		wantError(t, err, blockdev.ErrUnavailable, host)
	}
}

func TestSlow(t *testing.T) {
	f, req, _ := newImage(t)
	gone := make(chan struct{})
	t.Cleanup(func() { close(gone) })
	hang := func(_ http.ResponseWriter, r *http.Request) bool {
		select {
		case <-r.Context().Done():
		case <-gone:
		}
		return true
	}
	t.Run("no answer", func(t *testing.T) {
		f.SetHook(hang)
		c := newClient(t, func(cfg *registry.Config) { cfg.Stall = 50 * time.Millisecond; cfg.Timeout = 120 * time.Millisecond })
		_, err := c.Resolve(t.Context(), req)
		wantError(t, err, blockdev.ErrUnavailable, req.Ref)
	})
	t.Run("stops in the middle of a layer", func(t *testing.T) {
		f.SetHook(nil)
		c := newClient(t, func(cfg *registry.Config) { cfg.Stall = 50 * time.Millisecond })
		m, err := c.Resolve(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Length", fmt.Sprint(m.Layers[0].Size))
			_, _ = w.Write(make([]byte, 1000))
			w.(http.Flusher).Flush()
			return hang(w, r)
		})
		b, err := fetch(t.Context(), c, m, 0, image.Credential{}, 0)
		wantError(t, err, blockdev.ErrUnavailable, "no byte for 50ms")
		if len(b) != 1000 {
			t.Errorf("%d bytes", len(b))
		}
	})
	t.Run("caller leaves", func(t *testing.T) {
		f.SetHook(hang)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := newClient(t).Resolve(ctx, req)
		if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, blockdev.ErrUnavailable) {
			t.Errorf("%v, want the caller's deadline", err)
		}
	})
}

// TestCutLayer: connections that break are taken up where they broke, and every
// byte comes once.
func TestCutLayer(t *testing.T) {
	f, req, layer := newImage(t)
	var received atomic.Int64
	c := newClient(t, func(cfg *registry.Config) { cfg.Received = func(n int64) { received.Add(n) } })
	m, err := c.Resolve(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	received.Store(0)
	f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		off := int64(0)
		if h := r.Header.Get("Range"); h != "" {
			if _, err := fmt.Sscanf(h, "bytes=%d-", &off); err != nil {
				t.Errorf("range %q", h)
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, len(layer.Blob)-1, len(layer.Blob)))
		}
		w.Header().Set("Content-Length", fmt.Sprint(int64(len(layer.Blob))-off))
		if off > 0 {
			w.WriteHeader(http.StatusPartialContent)
		}
		end := min(off+100_000, int64(len(layer.Blob)))
		_, _ = w.Write(layer.Blob[off:end])
		return true
	})
	b, err := fetch(t.Context(), c, m, 0, image.Credential{}, 0)
	if err != nil || !bytes.Equal(b, layer.Blob) {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if n := received.Load(); n != int64(len(layer.Blob)) {
		t.Errorf("received %d bytes for %d", n, len(layer.Blob))
	}
}

func TestWrongLayerAnswers(t *testing.T) {
	serve := func(status int, hdr map[string]string, b []byte) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			for k, v := range hdr {
				w.Header().Set(k, v)
			}
			w.WriteHeader(status)
			_, _ = w.Write(b)
			return true
		}
	}
	f, req, layer := newImage(t)
	c := newClient(t)
	m, err := c.Resolve(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	size := len(layer.Blob)
	for _, tc := range []struct {
		name string
		off  int64
		hook func(http.ResponseWriter, *http.Request) bool
		want error // nil: right bytes
	}{
		{"range ignored", 1000, serve(200, nil, layer.Blob), nil},
		{"range ignored, with a misleading header", 1000, serve(200, map[string]string{"Content-Range": fmt.Sprintf("bytes 1000-%d/%d", size-1, size)}, layer.Blob), nil},
		{"another range", 1000, serve(206, map[string]string{"Content-Range": fmt.Sprintf("bytes 0-%d/%d", size-1, size)}, layer.Blob), blockdev.ErrUnavailable},
		{"a range without saying which", 1000, serve(206, nil, layer.Blob[1000:]), blockdev.ErrUnavailable},
		{"a range unasked", 0, serve(206, map[string]string{"Content-Range": "bytes 5-6/7"}, layer.Blob), blockdev.ErrUnavailable},
		{"416", 1000, serve(416, nil, nil), blockdev.ErrCorrupt},
		{"shorter", 0, serve(200, map[string]string{"Content-Length": "1000"}, layer.Blob[:1000]), blockdev.ErrCorrupt},
		{"empty", 0, serve(200, nil, nil), blockdev.ErrCorrupt},
		{"longer", 0, serve(200, nil, append(layer.Blob[:size:size], 'x')), blockdev.ErrCorrupt},
		{"compressed once more", 0, serve(200, map[string]string{"Content-Encoding": "gzip"}, layer.Blob), blockdev.ErrUnavailable},
		{"404", 0, serve(404, nil, nil), blockdev.ErrNotFound},
		{"429", 0, serve(429, map[string]string{"Retry-After": "3"}, nil), blockdev.ErrUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f.SetHook(tc.hook)
			b, err := fetch(t.Context(), c, m, 0, image.Credential{}, tc.off)
			if tc.want == nil {
				if err != nil || !bytes.Equal(b, layer.Blob[tc.off:]) {
					t.Errorf("%d bytes, %v", len(b), err)
				}
				return
			}
			wantError(t, err, tc.want, m.Layers[0].Digest.String())
		})
	}
}

func TestBadManifests(t *testing.T) {
	layer := registrytest.GzipLayer(t, "file", 100, 1)
	linux := registrytest.Platform{OS: "linux", Architecture: "amd64"}
	config := registrytest.Config(t, linux, layer)
	good := string(registrytest.Manifest(t, registrytest.TypeManifest, config, layer))
	typed := func(mt string) []byte { return []byte(strings.Replace(good, registrytest.TypeGzip, mt, 1)) }
	for _, tc := range []struct {
		name, contentType string
		manifest, config  []byte
		want              error
		mention           string
	}{
		{"good", "", []byte(good), config, nil, ""},
		{"wrong content type", "text/html", []byte(good), config, nil, ""},
		{"content type of an index", registrytest.TypeIndex, []byte(good), config, nil, ""},
		{"html", "", []byte("<html>login</html>"), config, blockdev.ErrCorrupt, "web page"},
		{"empty", "", []byte("{}"), config, blockdev.ErrUnsupported, "schema version 0"},
		{"schema 1", "", []byte(`{"schemaVersion":1,"fsLayers":[{"blobSum":"x"}]}`), config, blockdev.ErrUnsupported, "schema 1"},
		{"both", "", []byte(strings.Replace(good, `"layers"`, `"manifests":[],"layers"`, 1)), config, blockdev.ErrCorrupt, "both"},
		{"rootfs without a type", "", nil, []byte(strings.Replace(string(config), `"type":"layers"`, `"type":""`, 1)), nil, ""},
		{"also a blob that is no layer", "", []byte(strings.Replace(good, `"layers":[`, `"layers":[{"mediaType":"application/vnd.cncf.model.weight.v1.raw","digest":"sha512:0","size":-1},`, 1)), config, nil, ""},
		{"no layer", "", typed("application/vnd.cncf.model.weight.v1.tar"), config, blockdev.ErrUnsupported, "weight.v1.tar"},
		{"layer of EROFS", "", []byte(strings.Replace(good, `"layers":[`, `"layers":[{"mediaType":"application/vnd.erofs.layer.v1","digest":"sha256:0","size":1},`, 1)), config, blockdev.ErrUnsupported, "erofs"},
		{"rootfs of another type", "", nil, []byte(strings.Replace(string(config), `"type":"layers"`, `"type":"trees"`, 1)), blockdev.ErrUnsupported, "trees"},
		{"artifact", "", []byte(strings.Replace(good, registrytest.TypeConfig, "application/vnd.cncf.helm.config.v1+json", 1)), config, blockdev.ErrUnsupported, "helm"},
		{"encrypted", "", typed(registrytest.TypeGzip + "+encrypted"), config, blockdev.ErrUnsupported, "+encrypted"},
		{"unknown compression", "", typed("application/vnd.oci.image.layer.v1.tar+xz"), config, blockdev.ErrUnsupported, "tar+xz"},
		{"sha512", "", []byte(strings.Replace(good, blockdev.Sum(layer.Blob).String(), "sha512:"+strings.Repeat("0", 128), 1)), config, blockdev.ErrUnsupported, "sha512"},
		{"negative size", "", []byte(strings.Replace(good, fmt.Sprintf(`"size":%d`, len(layer.Blob)), `"size":-1`, 1)), config, blockdev.ErrUnsupported, "-1"},
		{"huge manifest", "", []byte(good + strings.Repeat(" ", 5<<20)), config, blockdev.ErrUnsupported, "larger"},
		{"config of another digest", "", []byte(good), []byte(strings.ReplaceAll(string(config), "linux", "plan9")), blockdev.ErrCorrupt, "another digest"},
		{"config cut", "", []byte(good), config[:10], blockdev.ErrCorrupt, "config"},
		{"two DiffIDs", "", nil, registrytest.Config(t, linux, layer, layer), blockdev.ErrCorrupt, "2 DiffIDs for 1 layers"},
		{"bad DiffID", "", nil, []byte(`{"rootfs":{"type":"layers","diff_ids":["sha256:xyz"]}}`), blockdev.ErrUnsupported, "xyz"},
		{"no rootfs", "", nil, []byte(`{}`), blockdev.ErrUnsupported, "rootfs"},
		{"config no JSON", "", nil, []byte(`hello`), blockdev.ErrCorrupt, "JSON"},
		{"1001 layers", "", registrytest.Manifest(t, registrytest.TypeManifest, config, make([]registrytest.Layer, 1001)...), config, blockdev.ErrUnsupported, "1001"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := registrytest.NewFake(t)
			if tc.manifest == nil {
				tc.manifest = registrytest.Manifest(t, registrytest.TypeManifest, tc.config, layer)
			}
			if tc.contentType == "" {
				tc.contentType = registrytest.TypeManifest
			}
			d := blockdev.Sum(tc.manifest)
			f.SetManifest("app", "v1", tc.contentType, d, tc.manifest)
			f.SetBlob("app", blockdev.Sum(config), tc.config)
			f.SetBlob("app", blockdev.Sum(tc.config), tc.config)
			for _, given := range []blockdev.Digest{d, {}} {
				m, err := newClient(t).Resolve(t.Context(), image.Request{Ref: f.Host + "/app:v1", Manifest: given, Platform: amd64})
				if tc.want == nil {
					if err != nil || len(m.Layers) != 1 {
						t.Errorf("%+v, %v", m, err)
					}
					continue
				}
				wantError(t, err, tc.want, tc.mention, f.Host+"/app:v1")
			}
		})
	}
}

func TestManifestWithOtherDigest(t *testing.T) {
	f, req, layer := newImage(t)
	cfg := registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, layer)
	f.SetManifest("app", "v1", registrytest.TypeManifest, req.Manifest, registrytest.Manifest(t, registrytest.TypeDocker, cfg, layer))
	_, err := newClient(t).Resolve(t.Context(), req)
	wantError(t, err, blockdev.ErrCorrupt, req.Ref, "another digest")
}

func TestBadReferences(t *testing.T) {
	c := newClient(t)
	for _, ref := range []string{
		"", "redis", "redis:7", "/redis:7", "docker.io:7", "docker.io/Redis:7", "docker.io/a/../b:7", "docker.io/a//b:7",
		"user:secret-of-alice@docker.io/a:7", "docker.io/a?x=y:7", "docker.io/a#x:7", "docker.io/redis", "docker.io/redis:",
		"docker.io/a@sha256:12", "docker.io/a:v1@sha512:00", "docker.io/a:" + strings.Repeat("x", 200), "https://docker.io/a:7",
		"docker.io/a:7\r\nHost: b", "docker.io/" + strings.Repeat("a/", 200) + "b:1", "../../etc:1",
	} {
		_, err := c.Resolve(t.Context(), image.Request{Ref: ref, Platform: amd64})
		if !errors.Is(err, blockdev.ErrNotFound) {
			t.Errorf("%q: %v", ref, err)
		}
	}
	r, err := registry.ParseReference("Registry.Example:5000/a/b_c/d--e:v1@" + blockdev.Digest{1}.String())
	if err != nil || r.Host != "registry.example:5000" || r.Repository != "a/b_c/d--e" || r.Tag != "v1" || r.Digest != (blockdev.Digest{1}) {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestCloseEndsRead: whoever reads a layer can be stopped from elsewhere.
func TestCloseEndsRead(t *testing.T) {
	f, req, _ := newImage(t)
	c := newClient(t)
	m, err := c.Resolve(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", fmt.Sprint(m.Layers[0].Size))
		_, _ = w.Write([]byte{1})
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		return true
	})
	rc, err := c.Fetch(t.Context(), m, m.Layers[0], image.Credential{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	reading := make(chan struct{})
	go func() {
		_, err := rc.Read(make([]byte, 1))
		close(reading)
		if err == nil {
			_, err = rc.Read(make([]byte, 1))
		}
		ended <- err
	}()
	<-reading
	for range 2 {
		if err := rc.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := <-ended; err == nil {
		t.Error("a read beyond the end of its reader")
	}
}

// TestNestedGuesses: an index whose entries do not say what they are for, and are indexes like it,
// makes a bounded number of requests.
func TestNestedGuesses(t *testing.T) {
	f := registrytest.NewFake(t)
	layer := registrytest.GzipLayer(t, "file", 10, 1)
	leaves := 0
	var nest func(depth int) registrytest.Descriptor
	nest = func(depth int) registrytest.Descriptor {
		if depth == 0 {
			leaves++
			config := registrytest.Config(t, registrytest.Platform{OS: "plan9", Architecture: fmt.Sprint("m", leaves)}, layer)
			f.SetBlob("app", blockdev.Sum(config), config)
			m := registrytest.Manifest(t, registrytest.TypeManifest, config, layer)
			f.SetManifest("app", "", registrytest.TypeManifest, blockdev.Sum(m), m)
			return registrytest.Descriptor{MediaType: registrytest.TypeManifest, Digest: blockdev.Sum(m), Size: len(m)}
		}
		var entries []registrytest.Descriptor
		for range 8 {
			entries = append(entries, nest(depth-1))
		}
		ix := registrytest.JSON(t, map[string]any{"schemaVersion": 2, "manifests": entries})
		f.SetManifest("app", "v1", registrytest.TypeIndex, blockdev.Sum(ix), ix)
		return registrytest.Descriptor{MediaType: registrytest.TypeIndex, Digest: blockdev.Sum(ix), Size: len(ix)}
	}
	nest(3)
	c := newClient(t)
	for range 3 { // what was kept does not bring the next one further
		_, err := c.Resolve(t.Context(), image.Request{Ref: f.Host + "/app:v1", Platform: amd64})
		wantError(t, err, blockdev.ErrUnsupported, "32")
	}
	if n := len(f.Requests("GET")); n > 32 {
		t.Errorf("%d requests", n)
	}
}
