package registry_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/pattern"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

func repositories(t *testing.T, texts ...string) *pattern.Repositories {
	t.Helper()
	list, err := pattern.ParseRepositories(texts)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestAllowed: what the list does not name is refused before anybody is asked for it,
// and a change counts at once.
func TestAllowed(t *testing.T) {
	f, req, layer := newImage(t)
	f.Forget()
	c := newClient(t, func(cfg *registry.Config) { cfg.Allowed = repositories(t, f.Host+"/other/*") })
	m := &registry.Manifest{Ref: req.Ref, Host: f.Host, Repository: "app"}
	l := registry.Layer{Digest: blockdev.Sum(layer.Blob), Size: int64(len(layer.Blob)), DiffID: layer.DiffID, MediaType: layer.MediaType}
	for what, err := range map[string]error{
		"an image": func() error { _, err := c.Resolve(t.Context(), req); return err }(),
		"access":   c.Check(t.Context(), req.Ref, blockdev.Digest{}, alice),
		"a blob":   c.HasBlob(t.Context(), m, l, alice),
		"a layer":  func() error { _, err := c.Fetch(t.Context(), m, l, alice, 0); return err }(),
	} {
		if wantError(t, err, blockdev.ErrUnauthorized); !registry.NotAllowed(err) || !strings.Contains(err.Error(), "registry.allowed") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := f.Requests(); len(n) != 0 {
		t.Errorf("the registry was asked: %v", n)
	}
	c.Allow(repositories(t, f.Host+"/app"))
	got, err := c.Resolve(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := fetch(t.Context(), c, got, 0, image.Credential{}, 0); err != nil || string(b) != string(layer.Blob) {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
}

// TestAllowedMirror: a host in hosts.toml is asked if the list names it, and one that
// a registry redirects to in any case.
func TestAllowedMirror(t *testing.T) {
	f, req, layer := newImage(t)
	mirror := registrytest.NewFake(t)
	mirror.Push(t, "dir/app", "v1", layer)
	storage := registrytest.NewFake(t)
	storage.SetBlob("app", blockdev.Sum(layer.Blob), layer.Blob)
	f.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/"+blockdev.Sum(layer.Blob).String()) {
			return false
		}
		http.Redirect(w, r, "http://"+storage.Host+r.URL.Path, http.StatusFound)
		return true
	})
	dir := hostsToml(t, f.Host, fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s/v2/dir\"]\ncapabilities = [\"pull\", \"resolve\"]\noverride_path = true\n", f.Host, mirror.Host))
	for name, tt := range map[string]struct {
		allowed []string
		mirror  bool
	}{
		"registry alone":       {[]string{f.Host + "/app"}, false},
		"mirror without path":  {[]string{f.Host + "/app", mirror.Host + "/app"}, false},
		"mirror":               {[]string{f.Host + "/app", mirror.Host + "/dir/*"}, true},
		"all":                  {[]string{"*"}, true},
		"mirror, not registry": {[]string{mirror.Host + "/*"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := newClient(t, func(cfg *registry.Config) { cfg.HostDirs, cfg.Allowed = []string{dir}, repositories(t, tt.allowed...) })
			mirror.Forget()
			m, err := c.Resolve(t.Context(), req)
			if name == "mirror, not registry" {
				if !registry.NotAllowed(err) {
					t.Error(err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if b, err := fetch(t.Context(), c, m, 0, image.Credential{}, 0); err != nil || string(b) != string(layer.Blob) {
				t.Fatalf("%d bytes, %v", len(b), err)
			}
			if asked := len(mirror.Requests()) > 0; asked != tt.mirror {
				t.Errorf("the mirror was asked: %v, want %v", asked, tt.mirror)
			}
		})
	}
	// All that hosts.toml has is another host.
	elsewhere := hostsToml(t, "registry.example", fmt.Sprintf("server = \"http://%s\"\n", f.Host))
	c := newClient(t, func(cfg *registry.Config) {
		cfg.HostDirs, cfg.Allowed = []string{elsewhere}, repositories(t, "registry.example/*")
	})
	req.Ref = "registry.example/app:v1"
	if _, err := c.Resolve(t.Context(), req); !registry.NotAllowed(err) {
		t.Error(err)
	}
}
