package supernode

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// Two tenants of one registry: alice, whose repositories nobody else may read, and
// mallory, who may push to repositories of her own, knows digests, and has no
// credential.

const foreignType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"

// listing makes an image of layers that the repository does not have.
func listing(t *testing.T, f *registrytest.Fake, repo string, layers ...registrytest.Layer) {
	t.Helper()
	config := registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, layers...)
	f.PushBlob(t, repo, config)
	f.PushManifest(t, repo, "v1", registrytest.TypeManifest, registrytest.Manifest(t, registrytest.TypeManifest, config, layers...))
}

func tenants(f *registrytest.Fake) {
	f.SetAuth(registrytest.Basic, users, func(user, repo string) bool {
		return user == alice.Username || !strings.HasPrefix(repo, "private/")
	})
}

// silent fails if an error says what only the other tenant knows.
func silent(t *testing.T, err error, secrets ...string) {
	t.Helper()
	for _, s := range append(secrets, "private/", alice.Secret) {
		if err != nil && strings.Contains(err.Error(), s) {
			t.Errorf("the error tells %q: %v", s, err)
		}
	}
}

// TestForeignLayer: a manifest may list any digest, most of all as a foreign layer,
// which registries do not look for. That opens nothing.
func TestForeignLayer(t *testing.T) {
	f := registrytest.NewFake(t)
	secret := registrytest.GzipLayer(t, "secret", 300_000, 1)
	f.Push(t, "private/app", "v1", secret)
	evil := secret
	evil.MediaType = foreignType
	listing(t, f, "mallory/x", evil)
	listing(t, f, "mallory/z", secret)
	guess := evil
	guess.DiffID = blockdev.Digest{1}
	listing(t, f, "mallory/y", guess)
	tenants(f)
	for name, change := range map[string]func(*Config){
		"stored": func(*Config) {}, "trusted": trust(f.Host), "not stored": nil,
	} {
		t.Run(name, func(t *testing.T) {
			var s *Supernode
			if change == nil {
				s = start(t)
			} else {
				s = start(t, change)
				if _, err := s.FetchIndexesFor(t.Context(), "alice", request(f.Target, "private/app:v1", alice)); err != nil {
					t.Fatal(err)
				}
			}
			for _, repo := range []string{"mallory/x", "mallory/y", "mallory/z"} {
				for _, peer := range []string{"mallory", "alice"} { // also on a node that has it
					_, err := s.FetchIndexesFor(t.Context(), peer, request(f.Target, repo+":v1", nobody))
					wantErr(t, err, blockdev.ErrNotFound, repo)
					if repo == "mallory/y" {
						silent(t, err, secret.DiffID.String())
					}
					silent(t, err, "stored")
				}
			}
		})
	}
	// While alice's is under way, too.
	t.Run("joined", func(t *testing.T) {
		s := start(t)
		var waiting watched
		began, goOn := make(chan struct{}, 8), make(chan struct{})
		f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, blockdev.Sum(secret.Blob).String()) && strings.Contains(r.URL.Path, "private/") {
				began <- struct{}{}
				<-goOn
			}
			return false
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := s.FetchIndexesFor(t.Context(), "alice", waiting.request(request(f.Target, "private/app:v1", alice))); err != nil {
				t.Error(err)
			}
		})
		<-began
		for _, repo := range []string{"mallory/x", "mallory/y"} {
			wg.Go(func() {
				_, err := s.FetchIndexesFor(t.Context(), "mallory", waiting.request(request(f.Target, repo+":v1", nobody)))
				wantErr(t, err, blockdev.ErrNotFound, repo)
				silent(t, err)
			})
		}
		waiting.wait(3)
		close(goOn)
		wg.Wait()
	})
}

// watched counts requests that wait for a layer that is on its way.
type watched struct{ n atomic.Int64 }

func (w *watched) request(req image.Request) image.Request {
	first := sync.OnceFunc(func() { w.n.Add(1) })
	req.Progress = func(image.Progress) { first() }
	return req
}

// wait returns when n requests wait, or have waited.
func (w *watched) wait(n int64) {
	for w.n.Load() < n {
		time.Sleep(time.Millisecond)
	}
}

// TestRepositoryShowsLayer: a repository that has a layer which came from another
// one of its registry shows that once, with a HEAD, however many ask; what it has
// shown counts after a restart.
func TestRepositoryShowsLayer(t *testing.T) {
	for name, refuse := range map[string]int{"HEAD": 0, "no HEAD": http.StatusMethodNotAllowed, "HEAD forbidden": http.StatusForbidden} {
		t.Run(name, func(t *testing.T) {
			f := registrytest.NewFake(t)
			base := registrytest.GzipLayer(t, "base", 300_000, 1)
			f.Push(t, "library/base", "v1", base)
			f.Push(t, "private/app", "v1", base)
			tenants(f)
			blob := "/blobs/" + blockdev.Sum(base.Blob).String()
			f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
				if refuse == 0 || r.Method != http.MethodHead || !strings.HasSuffix(r.URL.Path, blob) || r.Header.Get("Authorization") == "" {
					return false
				}
				w.WriteHeader(refuse)
				return true
			})
			dir := filepath.Join(t.TempDir(), "data")
			t.Run("asked", func(t *testing.T) {
				s := start(t, at(dir))
				if _, err := s.FetchIndexesFor(t.Context(), "p", request(f.Target, "library/base:v1", nobody)); err != nil {
					t.Fatal(err)
				}
				f.Forget()
				var wg sync.WaitGroup
				for i := range 20 {
					wg.Go(func() {
						img, err := s.FetchIndexesFor(t.Context(), fmt.Sprint("node", i), request(f.Target, "private/app:v1", alice))
						if err != nil {
							t.Error(err)
							return
						}
						wantImage(t, s, img, base)
					})
				}
				wg.Wait()
				// One with a challenge before it.
				if n := len(f.Requests("HEAD", blob)); n < 1 || n > 2 {
					t.Errorf("%d HEADs of the layer", n)
				}
				if n := len(f.Requests("GET", blob)); refuse == 0 && n != 0 || n > 2 {
					t.Errorf("%d GETs of the layer", n)
				}
			})
			t.Run("remembered", func(t *testing.T) {
				s := start(t, at(dir))
				f.Forget()
				if _, err := s.FetchIndexesFor(t.Context(), "q", request(f.Target, "private/app:v1", alice)); err != nil {
					t.Fatal(err)
				}
				if r := f.Requests(blob); len(r) != 0 {
					t.Errorf("asked again: %v", r)
				}
			})
		})
	}
}

// TestHostOrigin: an origin that is only a host, as stores of older versions have
// them, opens nothing by itself.
func TestHostOrigin(t *testing.T) {
	f := registrytest.NewFake(t)
	secret := registrytest.GzipLayer(t, "secret", 1000, 1)
	f.Push(t, "private/app", "v1", secret)
	listing(t, f, "mallory/x", secret)
	tenants(f)
	s := start(t)
	if _, err := s.FetchIndexesFor(t.Context(), "alice", request(f.Target, "private/app:v1", alice)); err != nil {
		t.Fatal(err)
	}
	if err := s.store.AddOrigin(blockdev.Sum(secret.Blob), f.Host); err != nil {
		t.Fatal(err)
	}
	_, err := s.FetchIndexesFor(t.Context(), "mallory", request(f.Target, "mallory/x:v1", nobody))
	wantErr(t, err, blockdev.ErrNotFound, "mallory/x")
}

// TestWrongSizeIsOnesOwnFault: a manifest that is wrong about a layer's size keeps
// nobody else from it, and its error is not theirs.
func TestWrongSizeIsOnesOwnFault(t *testing.T) {
	f := registrytest.NewFake(t)
	l := registrytest.GzipLayer(t, "base", 300_000, 1)
	f.Push(t, "private/base", "v1", l)
	config := registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, l)
	f.PushBlob(t, "mallory/x", config)
	f.PushBlob(t, "mallory/x", l.Blob)
	m, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": registrytest.TypeManifest,
		"layers": []registrytest.Descriptor{{MediaType: l.MediaType, Digest: blockdev.Sum(l.Blob), Size: len(l.Blob) - 1}},
		"config": registrytest.Descriptor{MediaType: registrytest.TypeConfig, Digest: blockdev.Sum(config), Size: len(config)}})
	if err != nil {
		t.Fatal(err)
	}
	f.PushManifest(t, "mallory/x", "v1", registrytest.TypeManifest, m)
	tenants(f)
	var logs logBuffer
	s := start(t, func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&logs, nil)) })
	for range 2 {
		_, err = s.FetchIndexesFor(t.Context(), "mallory", request(f.Target, "mallory/x:v1", nobody))
		wantErr(t, err, blockdev.ErrCorrupt, "mallory/x:v1")
		silent(t, err)
	}
	img, err := s.FetchIndexesFor(t.Context(), "alice", request(f.Target, "private/base:v1", alice))
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, s, img, l)
}

// TestRefusedDoNotCrowdOut: those who may not have a layer do not keep its owner
// from it, however many of them ask first.
func TestRefusedDoNotCrowdOut(t *testing.T) {
	f := registrytest.NewFake(t)
	secret := registrytest.GzipLayer(t, "secret", 1000, 1)
	f.Push(t, "private/app", "v1", secret)
	const many = 20
	for i := range many {
		listing(t, f, fmt.Sprint("mallory/x", i), secret)
	}
	tenants(f)
	goOn := make(chan struct{})
	blob := blockdev.Sum(secret.Blob).String()
	f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/v2/mallory/") && strings.HasSuffix(r.URL.Path, blob) {
			<-goOn
		}
		return false
	})
	s := start(t)
	var waiting watched
	var wg sync.WaitGroup
	for i := range many {
		wg.Go(func() {
			_, err := s.FetchIndexesFor(t.Context(), "mallory", waiting.request(request(f.Target, fmt.Sprintf("mallory/x%d:v1", i), nobody)))
			wantErr(t, err, blockdev.ErrNotFound, fmt.Sprint("mallory/x", i))
			silent(t, err)
		})
	}
	waiting.wait(many)
	wg.Go(func() {
		if _, err := s.FetchIndexesFor(t.Context(), "alice", waiting.request(request(f.Target, "private/app:v1", alice))); err != nil {
			t.Error(err)
		}
	})
	waiting.wait(many + 1)
	close(goOn)
	wg.Wait()
}

// TestRateLimitIsNoOutage: access that was withdrawn does not come back because the
// registry wants to be asked less often.
func TestRateLimitIsNoOutage(t *testing.T) {
	f := registrytest.NewFake(t)
	f.Push(t, "private/app", "v1", registrytest.GzipLayer(t, "secret", 1000, 1))
	f.Push(t, "open/app", "v1", registrytest.GzipLayer(t, "open", 1000, 2))
	f.SetAuth(registrytest.Bearer, users, func(user, repo string) bool { return user == alice.Username || repo == "open/app" })
	s := start(t, func(c *Config) {
		c.AccessTTL, c.AccessGrace, c.Registry.HostsTTL = time.Nanosecond, 24*time.Hour, time.Nanosecond // tokens are kept as long
	})
	open := func(peer, ref string, c image.Credential) error {
		_, err := s.FetchIndexesFor(t.Context(), peer, request(f.Target, ref, c))
		return err
	}
	for ref, c := range map[string]image.Credential{"private/app:v1": alice, "open/app:v1": nobody} {
		if err := open("p", ref, c); err != nil {
			t.Fatal(err)
		}
	}
	limit := func(all bool) {
		f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
			token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
			user, err := base64.RawURLEncoding.DecodeString(token)
			if !ok || err != nil || !all && strings.Contains(string(user), alice.Username) {
				return false
			}
			w.Header().Set("Retry-After", "3600")
			registrytest.Fail(w, http.StatusTooManyRequests, "TOOMANYREQUESTS")
			return true
		})
	}
	limit(true)
	wantErr(t, open("p", "private/app:v1", alice), blockdev.ErrUnavailable, "429", "1h0m0s")
	limit(false)
	if err := open("p", "private/app:v1", alice); err != nil {
		t.Errorf("with a credential that the registry takes: %v", err)
	}
	f.SetAuth(registrytest.Bearer, map[string]string{}, func(_, repo string) bool { return repo == "open/app" }) // withdrawn
	wantErr(t, open("p", "private/app:v1", nobody), blockdev.ErrUnavailable, "429")
	wantErr(t, open("p", "private/app:v1", alice), blockdev.ErrUnauthorized)
	limit(true)
	wantErr(t, open("p", "private/app:v1", alice), blockdev.ErrUnauthorized)
	// What anybody may have needs no credential that could be withdrawn.
	for _, c := range []image.Credential{nobody, alice} {
		if err := open("q", "open/app:v1", c); err != nil {
			t.Errorf("public: %v", err)
		}
	}
	// Nobody has made the registry count as down.
	f.SetHook(nil)
	f.SetAuth(registrytest.Bearer, users, onlyAliceReads)
	wantErr(t, open("p", "private/app:v1", image.Credential{Username: alice.Username, Secret: "guess"}), blockdev.ErrUnauthorized)
}

// TestPlainStorageShowsNothing: where a registry sends requests for layers away from
// TLS, anybody in between could say yes for it. Only the bytes are proof.
func TestPlainStorageShowsNothing(t *testing.T) {
	f, storage := registrytest.NewFakeTLS(t), registrytest.NewFake(t)
	base := registrytest.GzipLayer(t, "base", 300_000, 1)
	config := registrytest.Config(t, registrytest.Platform{OS: "linux", Architecture: "amd64"}, base)
	m := registrytest.Manifest(t, registrytest.TypeManifest, config, base)
	blob := "/blobs/" + blockdev.Sum(base.Blob).String()
	for _, repo := range []string{"base", "app", "mallory"} {
		f.SetManifest(repo, "v1", registrytest.TypeManifest, blockdev.Sum(m), m)
		f.SetBlob(repo, blockdev.Sum(config), config)
		storage.SetBlob(repo, blockdev.Sum(base.Blob), base.Blob)
	}
	// What is not taken for loopback, where plain HTTP needs no permission.
	f.Script(registrytest.On("", blob, registrytest.RedirectTo("http://"+strings.Replace(storage.Host, "127.0.0.1", "0.0.0.0", 1))))
	dirs := t.TempDir()
	if err := os.Mkdir(filepath.Join(dirs, "registry.example"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dirs, "registry.example", "hosts.toml"), fmt.Appendf(nil, "server = \"https://%s\"\nskip_verify = true\n", f.Host), 0o644); err != nil {
		t.Fatal(err)
	}
	s := start(t, func(c *Config) { c.HostDirs = []string{dirs} })
	open := func(repo string) error {
		img, err := s.FetchIndexes(t.Context(), image.Request{Ref: "registry.example/" + repo + ":v1", Platform: amd64})
		if err == nil {
			wantImage(t, s, img, base)
		}
		return err
	}
	if err := open("base"); err != nil {
		t.Fatal(err)
	}
	storage.Forget()
	if err := open("app"); err != nil {
		t.Fatal(err)
	}
	if n := len(storage.Requests("GET", "/app"+blob)); n != 1 {
		t.Errorf("%d requests for the layer's bytes", n)
	}
	storage.Script(registrytest.On("", "/mallory"+blob, registrytest.Blob{Data: make([]byte, len(base.Blob))}.Serve))
	wantErr(t, open("mallory"), blockdev.ErrCorrupt, "mallory")
}
