package registry_test

import (
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

var (
	users = map[string]string{registrytest.RealUser: registrytest.RealPassword}
	alice = image.Credential{Username: registrytest.RealUser, Secret: registrytest.RealPassword}
)

func onlyAlice(user, _ string) bool { return user == registrytest.RealUser }

// noCredential fails if any request carried an Authorization header.
func noCredential(t *testing.T, what string, f *registrytest.Fake) {
	t.Helper()
	for _, h := range f.Headers() {
		if a := h.Get("Authorization"); a != "" {
			t.Errorf("%s got the header Authorization: %s", what, a)
		}
		if k := h.Get("X-Api-Key"); k != "" {
			t.Errorf("%s got the header X-Api-Key", what)
		}
	}
	if len(f.Headers()) == 0 {
		t.Errorf("%s was not asked at all", what)
	}
}

// TestRedirect: blobs often come from a storage service under another name. It
// gets neither the credential nor the token, and its signed URL is not shown.
func TestRedirect(t *testing.T) {
	for _, a := range []registrytest.Auth{registrytest.Basic, registrytest.Bearer} {
		t.Run(fmt.Sprint(a), func(t *testing.T) {
			f, req, layer := newImage(t)
			req.Credential = alice
			f.SetAuth(a, users, onlyAlice)
			store := registrytest.NewFake(t)
			store.SetBlob("app", blockdev.Sum(layer.Blob), layer.Blob)
			var logs logBuffer
			c := newClient(t, func(cfg *registry.Config) { cfg.Log = slog.New(slog.NewTextHandler(&logs, nil)) })
			m, err := c.Resolve(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
				if strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Authorization") != "" {
					http.Redirect(w, r, "http://"+store.Host+r.URL.Path+"?X-Amz-Signature=Signature=abc", http.StatusTemporaryRedirect)
					return true
				}
				return false
			})
			b, err := fetch(t.Context(), c, m, 0, alice, 100)
			if err != nil || string(b) != string(layer.Blob[100:]) {
				t.Fatalf("%d bytes, %v", len(b), err)
			}
			noCredential(t, "the storage service", store)

			// Failures behind the redirect do not show its URL's query either.
			for _, status := range []int{401, 403, 500} {
				store.SetHook(func(w http.ResponseWriter, _ *http.Request) bool {
					w.Header().Set("WWW-Authenticate", `Basic realm="give me all"`)
					registrytest.Fail(w, status, "DENIED")
					return true
				})
				_, err = fetch(t.Context(), c, m, 0, alice, 0)
				if err == nil {
					t.Fatal("no error")
				}
				noSecret(t, err.Error())
			}
			noCredential(t, "the storage service", store)
			store.Close()
			_, err = fetch(t.Context(), c, m, 0, alice, 0)
			wantError(t, err, blockdev.ErrUnavailable, store.Host)
			noSecret(t, logs.String())
		})
	}
}

// TestTokenServerRedirect: a request that holds a password is not sent on.
func TestTokenServerRedirect(t *testing.T) {
	f, req, _ := newImage(t)
	f.SetAuth(registrytest.Bearer, users, onlyAlice)
	req.Credential = alice
	other := registrytest.NewFake(t)
	f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/token" {
			http.Redirect(w, r, "http://"+other.Host+"/token", http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	_, err := newClient(t).Resolve(t.Context(), req)
	if err == nil {
		t.Fatal("no error")
	}
	noSecret(t, err.Error())
	if n := len(other.Requests()); n != 0 {
		t.Errorf("the other server got %v", other.Requests())
	}
}

// TestTokenServerBody: a token server cannot fill the memory.
func TestTokenServerBody(t *testing.T) {
	f, req, _ := newImage(t)
	f.SetAuth(registrytest.Bearer, users, onlyAlice)
	f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/token" {
			return false
		}
		_, _ = w.Write([]byte(`{"token":"`))
		for i := 0; i < 64; i++ {
			if _, err := w.Write([]byte(strings.Repeat("x", 1<<20))); err != nil {
				return true
			}
		}
		return true
	})
	_, err := newClient(t).Resolve(t.Context(), req)
	wantError(t, err, blockdev.ErrUnavailable, "larger")
}

func TestIdentityToken(t *testing.T) {
	f, req, _ := newImage(t)
	f.SetAuth(registrytest.Bearer, users, onlyAlice)
	req.Credential = image.Credential{Secret: registrytest.RealUser + "/" + registrytest.RealPassword}
	if _, err := newClient(t).Resolve(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if len(f.Requests("POST /token")) == 0 {
		t.Errorf("no token was asked for: %v", f.Requests())
	}
}

// TestWrongPasswordOnce: a refused password is not tried again and again.
func TestWrongPasswordOnce(t *testing.T) {
	f, req, _ := newImage(t)
	f.SetAuth(registrytest.Basic, users, onlyAlice)
	err := newClient(t).Check(t.Context(), req.Ref, req.Manifest, image.Credential{Username: registrytest.RealUser, Secret: "wrong"})
	wantError(t, err, blockdev.ErrUnauthorized)
	n := 0
	for _, h := range f.Headers() {
		if h.Get("Authorization") != "" {
			n++
		}
	}
	if n != 1 && n != 2 { // manifests, and blobs, where containerd looks next
		t.Errorf("the password was sent %d times: %v", n, f.Requests())
	}
}

func hostsToml(t *testing.T, host, content string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, host), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestMirror: hosts.toml works as with containerd: the mirror is asked first,
// with the namespace and its own headers, and without our credential; the
// registry follows.
func TestMirror(t *testing.T) {
	f, req, layer := newImage(t)
	f.SetAuth(registrytest.Basic, users, onlyAlice)
	mirror := registrytest.NewFake(t)
	mirror.SetAuth(registrytest.Basic, users, onlyAlice)
	mirror.Push(t, "app", "v1", layer)
	mirror.Forget()
	dirs := []string{t.TempDir(), hostsToml(t, "registry.example", fmt.Sprintf(`
server = "http://%s"
[host."http://%s"]
  capabilities = ["pull", "resolve"]
  [host."http://%s".header]
    X-Mirror = "yes"
`, f.Host, mirror.Host, mirror.Host))}
	c := newClient(t, func(cfg *registry.Config) { cfg.HostDirs = dirs })
	req.Ref, req.Credential = "registry.example/app:v1", alice
	m, err := c.Resolve(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := fetch(t.Context(), c, m, 0, alice, 0); err != nil || string(b) != string(layer.Blob) {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if m.Host != "registry.example" {
		t.Errorf("host %s", m.Host)
	}
	noCredential(t, "the mirror", mirror)
	if mirror.Headers()[0].Get("X-Mirror") != "yes" {
		t.Error("the mirror did not get its header")
	}
	// An open mirror serves all of it, and a broken one does no harm.
	mirror.SetAuth(registrytest.Open, nil, nil)
	f.Forget()
	if b, err := fetch(t.Context(), c, m, 0, alice, 5); err != nil || string(b) != string(layer.Blob[5:]) {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if n := len(f.Requests()); n != 0 {
		t.Errorf("the registry was asked %d times though the mirror has it", n)
	}
	mirror.SetManifest("app", "v1", registrytest.TypeManifest, m.Digest, []byte("rubbish"))
	fresh := newClient(t, func(cfg *registry.Config) { cfg.HostDirs = dirs })
	if _, err := fresh.Resolve(t.Context(), req); err != nil {
		t.Errorf("a mirror with rubbish: %v", err)
	}
	mirror.Close()
	fresh = newClient(t, func(cfg *registry.Config) { cfg.HostDirs = dirs })
	if _, err := fresh.Resolve(t.Context(), req); err != nil {
		t.Errorf("a mirror that is down: %v", err)
	}
}

// TestCheckAsksTheRegistry: a mirror that may only pull has no say in who may
// read.
func TestCheckAsksTheRegistry(t *testing.T) {
	f, req, layer := newImage(t)
	f.SetAuth(registrytest.Basic, users, onlyAlice)
	mirror := registrytest.NewFake(t)
	mirror.Push(t, "app", "v1", layer)
	dir := hostsToml(t, "registry.example", fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\"]\n", f.Host, mirror.Host))
	c := newClient(t, func(cfg *registry.Config) { cfg.HostDirs = []string{dir} })
	ref := "registry.example/app:v1"
	wantError(t, c.Check(t.Context(), ref, req.Manifest, image.Credential{}), blockdev.ErrUnauthorized)
	if err := c.Check(t.Context(), ref, req.Manifest, alice); err != nil {
		t.Error(err)
	}
}

// TestCustomHeaderStays: a key that hosts.toml adds is not for redirect targets.
func TestCustomHeaderStays(t *testing.T) {
	f, req, layer := newImage(t)
	store := registrytest.NewFake(t)
	store.SetBlob("app", blockdev.Sum(layer.Blob), layer.Blob)
	f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("X-Api-Key") != "key" {
			t.Error("the registry did not get its header")
		}
		if r.URL.Path != "/v2/app/blobs/"+blockdev.Sum(layer.Blob).String() {
			return false
		}
		http.Redirect(w, r, "http://"+store.Host+r.URL.Path, http.StatusFound)
		return true
	})
	dir := hostsToml(t, "registry.example", fmt.Sprintf("server = \"http://%s\"\n[header]\nX-Api-Key = \"key\"\n", f.Host))
	c := newClient(t, func(cfg *registry.Config) { cfg.HostDirs = []string{dir} })
	req.Ref = "registry.example/app:v1"
	m, err := c.Resolve(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := fetch(t.Context(), c, m, 0, image.Credential{}, 0); err != nil || string(b) != string(layer.Blob) {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	noCredential(t, "the storage service", store)
}

// TestLocalhostTLS: as with containerd, loopback is tried with TLS and no
// verification first.
func TestLocalhostTLS(t *testing.T) {
	f := registrytest.NewFakeTLS(t)
	layer := registrytest.GzipLayer(t, "f", 10, 1)
	cfg := registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, layer)
	m := registrytest.Manifest(t, registrytest.TypeManifest, cfg, layer)
	f.SetManifest("app", "v1", registrytest.TypeManifest, blockdev.Sum(m), m)
	f.SetBlob("app", blockdev.Sum(cfg), cfg)
	if _, err := newClient(t).Resolve(t.Context(), image.Request{Ref: f.Host + "/app:v1", Platform: amd64}); err != nil {
		t.Error(err)
	}
	// Elsewhere an unknown certificate is refused.
	dir := hostsToml(t, "registry.example", fmt.Sprintf("server = \"https://%s\"\n", f.Host))
	c := newClient(t, func(cfg *registry.Config) { cfg.HostDirs = []string{dir} })
	_, err := c.Resolve(t.Context(), image.Request{Ref: "registry.example/app:v1", Platform: amd64})
	wantError(t, err, blockdev.ErrUnavailable, "certificate")
}

func TestCache(t *testing.T) {
	f, req, layer := newImage(t)
	dir := t.TempDir()
	with := func(cfg *registry.Config) { cfg.CacheDir = dir; cfg.TagTTL = time.Hour }
	byTag := req
	byTag.Manifest = blockdev.Digest{}
	if _, err := newClient(t, with).Resolve(t.Context(), byTag); err != nil {
		t.Fatal(err)
	}
	f.Forget()
	for _, r := range []image.Request{req, byTag} { // another client, the same directory
		m, err := newClient(t, with).Resolve(t.Context(), r)
		if err != nil || m.Digest != req.Manifest || len(m.Layers) != 1 {
			t.Errorf("%+v, %v", m, err)
		}
	}
	if n := f.Requests(); len(n) != 0 {
		t.Errorf("cached, but asked: %v", n)
	}
	// Another repository's name does not open this one's documents.
	other := req
	other.Ref = f.Host + "/other:v1"
	_, err := newClient(t, with).Resolve(t.Context(), other)
	wantError(t, err, blockdev.ErrNotFound)

	// A tag that has expired is asked again, and the new meaning counts.
	second := f.Push(t, "app", "v1", layer, registrytest.GzipLayer(t, "more", 10, 3))
	expired := func(cfg *registry.Config) { cfg.CacheDir = dir; cfg.TagTTL = 1 }
	m, err := newClient(t, expired).Resolve(t.Context(), byTag)
	if err != nil || m.Digest != second {
		t.Errorf("%+v, %v", m, err)
	}
	// Damage on disk is found and repaired.
	for _, e := range files(t, dir) {
		if err := os.WriteFile(filepath.Join(dir, e.Name()), []byte("damage"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if m, err = newClient(t, with).Resolve(t.Context(), byTag); err != nil || m.Digest != second {
		t.Errorf("%+v, %v", m, err)
	}
	// The registry is gone: the last meaning counts.
	f.Close()
	if m, err = newClient(t, expired).Resolve(t.Context(), byTag); err != nil || m.Digest != second {
		t.Errorf("%+v, %v", m, err)
	}
}

// TestKeptTagNamesNothing: one digit of the digest in the file of a tag is another
// one, by a bit that flipped; or what it names has been deleted since.
func TestKeptTagNamesNothing(t *testing.T) {
	f, req, _ := newImage(t)
	dir := t.TempDir()
	with := func(cfg *registry.Config) { cfg.CacheDir = dir; cfg.TagTTL = time.Hour }
	byTag := req
	byTag.Manifest = blockdev.Digest{}
	damage := func() {
		t.Helper()
		if _, err := newClient(t, with).Resolve(t.Context(), byTag); err != nil {
			t.Fatal(err)
		}
		for _, e := range files(t, dir) {
			path := filepath.Join(dir, e.Name())
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if string(b) == req.Manifest.String() {
				digit := byte('1')
				if b[len(b)-1] == digit {
					digit = '3'
				}
				b[len(b)-1] = digit
				if err := os.WriteFile(path, b, 0o600); err != nil {
					t.Fatal(err)
				}
				return
			}
		}
		t.Fatal("no file of the tag")
	}
	damage()
	if m, err := newClient(t, with).Resolve(t.Context(), byTag); err != nil || m.Digest != req.Manifest {
		t.Errorf("%+v, %v", m, err)
	}
	damage()
	doc, err := newClient(t, with).Document(t.Context(), image.DocumentRequest{Ref: byTag.Ref})
	if err != nil || doc.Digest != req.Manifest {
		t.Errorf("%+v, %v", doc, err)
	}
	// What the registry does not have either way is not there.
	damage()
	f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		registrytest.Fail(w, http.StatusNotFound, "MANIFEST_UNKNOWN")
		return true
	})
	_, err = newClient(t, with).Resolve(t.Context(), byTag)
	wantError(t, err, blockdev.ErrNotFound, byTag.Ref)
}

func files(t *testing.T, dir string) []os.DirEntry {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	return files
}

func TestCacheIsBounded(t *testing.T) {
	f := registrytest.NewFake(t)
	dir := t.TempDir()
	c := newClient(t, func(cfg *registry.Config) { cfg.CacheDir = dir; cfg.CacheBytes = 16 << 10 })
	for i := range 30 {
		tag := fmt.Sprint("v", i)
		f.Push(t, "app", tag, registrytest.GzipLayer(t, tag, 10, uint64(i)))
		if _, err := c.Resolve(t.Context(), image.Request{Ref: f.Host + "/app:" + tag, Platform: amd64}); err != nil {
			t.Fatal(err)
		}
	}
	var bytes int64
	for _, e := range files(t, dir) {
		fi, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		bytes += fi.Size()
	}
	if bytes > 16<<10 {
		t.Errorf("%d bytes in the cache, 16 KiB allowed", bytes)
	}
}
