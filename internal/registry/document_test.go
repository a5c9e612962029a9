package registry_test

import (
	"errors"
	"fmt"
	"net/http"
	"path"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestDocumentWaitsWithoutBytes: while a registry does not send the config, requests for the
// manifest wait, and hold no manifest in memory: there may be thousands of them.
func TestDocumentWaitsWithoutBytes(t *testing.T) {
	f := registrytest.NewFake(t)
	layer := registrytest.GzipLayer(t, "a", 1000, 1)
	const requests, padding = 8, 3 << 20
	for i := range requests {
		config := registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, layer)
		config = append(config, strings.Repeat(" ", i)...) // of its own
		f.PushBlob(t, "app", config)
		m := registrytest.Manifest(t, registrytest.TypeManifest, config, layer)
		m = append(m[:len(m)-1], fmt.Sprintf(`,"annotations":{"a":"%d%s"}}`, i, strings.Repeat("x", padding))...)
		f.PushManifest(t, "app", fmt.Sprint("v", i), registrytest.TypeManifest, m)
	}
	release := make(chan struct{})
	f.SetHook(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			<-release
		}
		return false
	})
	c := newClient(t, func(cfg *registry.Config) {
		cfg.CacheDir, cfg.Timeout, cfg.Stall = t.TempDir(), time.Minute, time.Minute
	})
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	var wg sync.WaitGroup
	for i := range requests {
		wg.Go(func() {
			doc, err := c.Document(t.Context(), image.DocumentRequest{Ref: fmt.Sprintf("%s/app:v%d", f.Host, i)})
			if err != nil || blockdev.Sum(doc.Data) != doc.Digest || len(doc.Data) < padding {
				t.Errorf("manifest %d: %v", i, err)
			}
		})
	}
	// All of them have read the manifest, and wait for its config.
	deadline := time.Now().Add(20 * time.Second)
	held := heap() - before
	for ; held > requests*padding/2 || len(f.Requests("GET", "/blobs/")) < requests; held = heap() - before {
		if time.Now().After(deadline) {
			t.Errorf("%d requests that wait for a config hold %d MiB", requests, held>>20)
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	close(release)
	wg.Wait()
}

// TestDocument: manifests, indexes and configs come byte for byte with their media
// types, by tag and by digest; what has been known once needs no registry.
func TestDocument(t *testing.T) {
	f := registrytest.NewFake(t)
	layer := registrytest.GzipLayer(t, "a", 1000, 1)
	id := f.Push(t, "app", "v1", layer)
	config := registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, layer)
	manifest := registrytest.Manifest(t, registrytest.TypeManifest, config, layer)
	index := registrytest.JSON(t, map[string]any{"schemaVersion": 2, "manifests": []registrytest.Descriptor{
		{MediaType: registrytest.TypeManifest, Digest: id, Size: len(manifest)},
	}})
	indexID := f.PushManifest(t, "app", "multi", registrytest.TypeIndex, index)
	if blockdev.Sum(manifest) != id {
		t.Fatal("the test does not know the manifest's bytes")
	}
	dir := t.TempDir()
	cached := func(cfg *registry.Config) { cfg.CacheDir = dir }
	c := newClient(t, cached)
	name := f.Host + "/app"
	configRef := name + "@" + blockdev.Sum(config).String()

	_, err := c.Document(t.Context(), image.DocumentRequest{Ref: configRef, Kind: image.ConfigDocument})
	wantError(t, err, blockdev.ErrNotFound, configRef)
	_, err = c.Document(t.Context(), image.DocumentRequest{Ref: name + ":v1", Kind: image.ConfigDocument})
	wantError(t, err, blockdev.ErrNotFound)
	check := func(c *registry.Client) {
		t.Helper()
		for _, want := range []struct {
			ref       string
			kind      image.DocumentKind
			id        blockdev.Digest
			mediaType string
			data      []byte
		}{
			{name + ":multi", image.ManifestDocument, indexID, registrytest.TypeIndex, index},
			{name + "@" + indexID.String(), image.ManifestDocument, indexID, registrytest.TypeIndex, index},
			{name + ":v1", image.ManifestDocument, id, registrytest.TypeManifest, manifest},
			{name + "@" + id.String(), image.ManifestDocument, id, registrytest.TypeManifest, manifest},
			{configRef, image.ConfigDocument, blockdev.Sum(config), "application/octet-stream", config},
		} {
			doc, err := c.Document(t.Context(), image.DocumentRequest{Ref: want.ref, Kind: want.kind})
			if err != nil {
				t.Fatal(err)
			}
			if doc.Digest != want.id || doc.MediaType != want.mediaType || doc.Size != int64(len(want.data)) || string(doc.Data) != string(want.data) {
				t.Errorf("%s: %s, %q, %d bytes", want.ref, doc.Digest, doc.MediaType, doc.Size)
			}
			head, err := c.Document(t.Context(), image.DocumentRequest{Ref: want.ref, Kind: want.kind, Head: true})
			if err != nil || head.Data != nil || head.Digest != want.id || head.Size != doc.Size {
				t.Errorf("%s: without the bytes: %+v, %v", want.ref, head, err)
			}
		}
	}
	check(c)
	// A layer is no document, though it is a blob of the repository.
	_, err = c.Document(t.Context(), image.DocumentRequest{Ref: name + "@" + blockdev.Sum(layer.Blob).String(), Kind: image.ConfigDocument})
	wantError(t, err, blockdev.ErrNotFound)
	// Nor is what another repository has.
	_, err = c.Document(t.Context(), image.DocumentRequest{Ref: f.Host + "/other@" + id.String()})
	wantError(t, err, blockdev.ErrNotFound)

	f.Close()
	check(newClient(t, cached))
	// Also when the tags were asked for long ago.
	check(newClient(t, cached, func(cfg *registry.Config) { cfg.TagTTL, cfg.Timeout = time.Nanosecond, time.Second }))
	_, err = c.Document(t.Context(), image.DocumentRequest{Ref: name + ":v2"})
	wantError(t, err, blockdev.ErrUnavailable, name+":v2")
}

func TestDocumentWrongBytes(t *testing.T) {
	f, req, _ := newImage(t)
	f.SetManifest("app", "v1", registrytest.TypeManifest, req.Manifest, []byte(`{"schemaVersion":2}`))
	_, err := newClient(t).Document(t.Context(), image.DocumentRequest{Ref: f.Host + "/app@" + req.Manifest.String()})
	wantError(t, err, blockdev.ErrCorrupt, req.Manifest.String())
}

// TestDocumentOnce: what many ask for at the same time is asked for once, and a
// tag that an access check has asked about is not asked about again.
func TestDocumentOnce(t *testing.T) {
	f, _, _ := newImage(t)
	ref := f.Host + "/app:v1"
	c := newClient(t, func(cfg *registry.Config) { cfg.CacheDir = t.TempDir() })
	arrived, release := make(chan struct{}, 1), make(chan struct{})
	f.SetHook(func(http.ResponseWriter, *http.Request) bool {
		select {
		case arrived <- struct{}{}:
		default:
		}
		<-release
		return false
	})
	f.Forget()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := c.Document(t.Context(), image.DocumentRequest{Ref: ref}); err != nil {
				t.Error(err)
			}
		})
	}
	<-arrived
	close(release)
	wg.Wait()
	if got := f.Requests(); len(got) != 3 {
		t.Errorf("the registry was asked %v; want its tag, manifest and config once each", got)
	}
	fresh := newClient(t, func(cfg *registry.Config) { cfg.CacheDir = t.TempDir() })
	f.Forget()
	if err := fresh.Check(t.Context(), ref, blockdev.Digest{}, image.Credential{}); err != nil {
		t.Fatal(err)
	}
	if _, err := fresh.Document(t.Context(), image.DocumentRequest{Ref: ref}); err != nil {
		t.Fatal(err)
	}
	if got := f.Requests("HEAD"); len(got) != 1 {
		t.Errorf("check and document asked for the tag %d times", len(got))
	}
}

// TestOwnMirror: a node's mirror in the hosts.toml that containerd shares with
// the supernode is found out and left out, and hides no answer of the registry.
func TestOwnMirror(t *testing.T) {
	f, req, layer := newImage(t)
	f.SetAuth(registrytest.Basic, users, onlyAlice)
	own := registrytest.NewFake(t)
	own.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.Header.Get("Via"), registry.Via) {
			t.Errorf("%s %s does not say whose request it is", r.Method, r.URL)
		}
		registrytest.Fail(w, http.StatusLoopDetected, "UNSUPPORTED")
		return true
	})
	dir := hostsToml(t, "registry.example", fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", f.Host, own.Host))
	c := newClient(t, func(cfg *registry.Config) { cfg.HostDirs = []string{dir} })
	ref := "registry.example/app:v1"
	wantError(t, c.Check(t.Context(), ref, blockdev.Digest{}, image.Credential{}), blockdev.ErrUnauthorized)
	if n := len(own.Requests()); n != 1 {
		t.Errorf("the mirror was asked %d times, want once", n)
	}
	wantError(t, c.Check(t.Context(), "registry.example/app:none", blockdev.Digest{}, alice), blockdev.ErrNotFound)
	req.Ref, req.Credential = ref, alice
	m, err := c.Resolve(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := fetch(t.Context(), c, m, 0, alice, 0); err != nil || string(b) != string(layer.Blob) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if n := len(own.Requests()); n != 1 {
		t.Errorf("the mirror was asked %d times in all, want once", n)
	}
	// Alone it is what the registry's word is.
	dir = hostsToml(t, "registry.example", fmt.Sprintf("server = \"http://%s\"\n", own.Host))
	c = newClient(t, func(cfg *registry.Config) { cfg.HostDirs = []string{dir} })
	wantError(t, c.Check(t.Context(), ref, blockdev.Digest{}, alice), blockdev.ErrUnavailable, "mirror")
}

// TestDocumentBytes: a registry that sends all but the end of its manifests does not have
// them all held in memory, and leaves room for others.
func TestDocumentBytes(t *testing.T) {
	layer := registrytest.GzipLayer(t, "a", 1000, 1)
	manifest := func(f *registrytest.Fake, tag string, padding int) []byte {
		config := registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, layer)
		f.PushBlob(t, "app", config)
		m := registrytest.Manifest(t, registrytest.TypeManifest, config, layer)
		m = append(m[:len(m)-1], fmt.Sprintf(`,"annotations":{"a":"%s%s"}}`, tag, strings.Repeat("x", padding))...)
		f.PushManifest(t, "app", tag, registrytest.TypeManifest, m)
		return m
	}
	bad, good := registrytest.NewFake(t), registrytest.NewFake(t)
	manifest(good, "v", 300<<10)
	const requests, size = 8, 300 << 10
	all := make(map[string][]byte)
	for i := range requests {
		m := manifest(bad, fmt.Sprint("v", i), size)
		all[blockdev.Sum(m).String()] = m
	}
	release := make(chan struct{})
	bad.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		m := all[path.Base(r.URL.Path)]
		if r.Method != http.MethodGet || m == nil {
			return false
		}
		w.Header().Set("Content-Type", registrytest.TypeManifest)
		w.Header().Set("Content-Length", strconv.Itoa(len(m)))
		_, _ = w.Write(m[:len(m)-1])
		_ = http.NewResponseController(w).Flush()
		<-release
		_, _ = w.Write(m[len(m)-1:])
		return true
	})
	c := newClient(t, func(cfg *registry.Config) {
		cfg.DocumentBytes, cfg.Timeout, cfg.Stall = 4*size, time.Minute, time.Minute
	})
	got := make(chan error, requests)
	for i := range requests {
		go func() {
			_, err := c.Document(t.Context(), image.DocumentRequest{Ref: fmt.Sprintf("%s/app:v%d", bad.Host, i)})
			got <- err
		}()
	}
	// No more than the half of 4 manifests may wait for their end.
	for range requests - 2 {
		select {
		case err := <-got:
			if !errors.Is(err, blockdev.ErrUnavailable) || registry.Outage(err) {
				t.Errorf("beyond the limit: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("a registry has more of its manifests held than its share")
		}
	}
	if _, err := c.Document(t.Context(), image.DocumentRequest{Ref: good.Host + "/app:v"}); err != nil {
		t.Errorf("another registry: %v", err)
	}
	close(release)
	for range 2 {
		<-got // they may have been in each other's way
	}
	if _, err := c.Document(t.Context(), image.DocumentRequest{Ref: bad.Host + "/app:v0"}); err != nil {
		t.Errorf("once there is room: %v", err)
	}
}
