package supernode

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/pattern"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestAllowed: a repository that the config does not name is opened for nobody, also
// if it is stored, and the metrics tell that from a registry's refusal.
func TestAllowed(t *testing.T) {
	f := registrytest.NewFake(t)
	layer := registrytest.GzipLayer(t, "a", 1000, 1)
	f.Push(t, "team/app", "v1", layer)
	reg := prometheus.NewRegistry()
	s := start(t, func(c *Config) { c.Registerer = reg })
	req := request(f.Target, "team/app:v1", nobody)
	if _, err := s.FetchIndexesFor(t.Context(), "p", req); err != nil {
		t.Fatal(err)
	}
	list, err := pattern.ParseRepositories([]string{"registry.example/*"})
	if err != nil {
		t.Fatal(err)
	}
	s.Allow(list)
	f.Forget()
	_, err = s.FetchIndexesFor(t.Context(), "p", req)
	wantErr(t, err, registry.ErrNotAllowed, f.Host+"/team/app", "registry.allowed")
	wantErr(t, err, blockdev.ErrUnauthorized)
	_, err = s.DocumentFor(t.Context(), "p", image.DocumentRequest{Ref: req.Ref})
	wantErr(t, err, registry.ErrNotAllowed, f.Host+"/team/app")
	if n := f.Requests(); len(n) != 0 {
		t.Errorf("the registry was asked: %v", n)
	}
	for _, what := range []string{"image", "document"} {
		if got := gather(t, reg)["shoal_supernode_"+what+"_requests_total{not_allowed}"]; got != 1 {
			t.Errorf("%s requests that were not allowed: %v\n%v", what, got, gather(t, reg))
		}
	}
	s.Allow(nil)
	if _, err := s.FetchIndexesFor(t.Context(), "p", req); err != nil {
		t.Error(err)
	}
}
