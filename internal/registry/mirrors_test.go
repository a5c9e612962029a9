package registry_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	rt "github.com/shoalfs/shoal/internal/registry/registrytest"
)

// mirrored is an image of registry.example, with a mirror before the registry.
type mirrored struct {
	reg, mirror *rt.Fake
	req         image.Request
	c           *registry.Client
}

func newMirrored(t *testing.T, change ...func(*registry.Config)) *mirrored {
	m := new(mirrored)
	var layer rt.Layer
	m.reg, m.req, layer = newImage(t)
	m.mirror = rt.NewFake(t)
	m.mirror.Push(t, "app", "v1", layer)
	m.req.Ref = "registry.example/app:v1"
	dir := hostsToml(t, "registry.example", fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", m.reg.Host, m.mirror.Host))
	m.c = newClient(t, append(change, func(cfg *registry.Config) { cfg.HostDirs = []string{dir} })...)
	return m
}

// TestMirrorHidesNothing: what a mirror says instead of an image is not what the registry says of
// it. Of two refusals, two outages and two limits that of the registry counts, in all that is asked.
func TestMirrorHidesNothing(t *testing.T) {
	basic := func(f *rt.Fake) { f.SetAuth(rt.Basic, users, onlyAlice) }
	bearer := func(f *rt.Fake) { f.SetAuth(rt.Bearer, users, onlyAlice) }
	says := func(odd ...rt.Odd) func(*rt.Fake) { return func(f *rt.Fake) { f.Script(odd...) } }
	type fault struct {
		name string
		set  func(*rt.Fake)
	}
	mirrors := []fault{
		{"closed", (*rt.Fake).Close},
		{"404", says(rt.Status(404))},
		{"401", basic},
		{"429", says(rt.Status(429, "Retry-After", "100"))},
		{"page", says(func(w http.ResponseWriter, r *http.Request) bool {
			return r.Method != http.MethodHead && rt.Blob{Data: []byte("<html>sign in</html>")}.Serve(w, r) || rt.Status(404)(w, r)
		})},
	}
	registries := []struct {
		fault
		kind            error
		outage, limited bool
		after           time.Duration
	}{
		{fault: fault{"401", basic}, kind: blockdev.ErrUnauthorized},
		{fault: fault{"bearer", bearer}, kind: blockdev.ErrUnauthorized},
		{fault: fault{"403", says(rt.Status(403))}, kind: blockdev.ErrUnauthorized},
		{fault: fault{"404", says(rt.Status(404))}, kind: blockdev.ErrNotFound},
		{fault: fault{"closed", (*rt.Fake).Close}, kind: blockdev.ErrUnavailable, outage: true},
		{fault: fault{"503", says(rt.Status(503, "Retry-After", "7"))}, kind: blockdev.ErrUnavailable, outage: true, after: 7 * time.Second},
		{fault: fault{"429", says(rt.Status(429, "Retry-After", "7"))}, kind: blockdev.ErrUnavailable, limited: true, after: 7 * time.Second},
		{fault: fault{"no token", func(f *rt.Fake) { bearer(f); f.Script(rt.On("", "/token", rt.Status(503, "Retry-After", "7"))) }},
			kind: blockdev.ErrUnavailable, outage: true, after: 7 * time.Second},
	}
	for _, mirror := range mirrors {
		for _, reg := range registries {
			t.Run(mirror.name+", "+reg.name, func(t *testing.T) {
				t.Parallel()
				m := newMirrored(t)
				man, err := m.c.Resolve(t.Context(), m.req)
				if err != nil {
					t.Fatal(err)
				}
				mirror.set(m.mirror)
				reg.set(m.reg)
				layer := man.Layers[0]
				other := m.req
				other.Ref, other.Manifest = "registry.example/app:other", blockdev.Digest{}
				other.Credential = image.Credential{Username: "bob", Secret: "wrong"}
				for what, ask := range map[string]func() error{
					"manifest":   func() error { return m.c.Check(t.Context(), m.req.Ref, m.req.Manifest, nobody) },
					"tag":        func() error { return m.c.Check(t.Context(), m.req.Ref, blockdev.Digest{}, nobody) },
					"credential": func() error { return m.c.Check(t.Context(), m.req.Ref, m.req.Manifest, other.Credential) },
					"image":      func() error { _, err := m.c.Resolve(t.Context(), other); return err },
					"document": func() error {
						_, err := m.c.Document(t.Context(), image.DocumentRequest{Ref: "registry.example/app@" + blockdev.Digest{1}.String()})
						return err
					},
					"layer": func() error { _, err := fetch(t.Context(), m.c, man, 0, nobody, 0); return err },
					"blob":  func() error { return m.c.HasBlob(t.Context(), man, layer, nobody) },
				} {
					if mirror.name == "page" && (what == "layer" || what == "blob") {
						continue // that they are the wrong bytes is found by those that read them
					}
					err := ask()
					var e *registry.Error
					if !errors.Is(err, reg.kind) || !errors.As(err, &e) {
						t.Errorf("%s: %v, want one that is %q", what, err, reg.kind)
						continue
					}
					if e.Host != m.reg.Host || registry.Outage(err) != reg.outage || registry.Limited(err) != reg.limited || e.RetryAfter() != reg.after {
						t.Errorf("%s: of %s, an outage: %t, a limit: %t, to wait %s: %v", what, e.Host, registry.Outage(err), registry.Limited(err), e.RetryAfter(), err)
					}
					if !strings.Contains(err.Error(), m.mirror.Host) {
						t.Errorf("%s: %q does not say that there is a mirror", what, err)
					}
					noSecret(t, err.Error())
				}
			})
		}
	}
}

// TestHungMirror: a mirror that does not answer takes half of a question's time, and not what the
// registry needs to answer it.
func TestHungMirror(t *testing.T) {
	m := newMirrored(t, func(cfg *registry.Config) { cfg.Timeout = 2 * time.Second })
	m.reg.SetAuth(rt.Basic, users, onlyAlice)
	m.mirror.SetHook(func(_ http.ResponseWriter, r *http.Request) bool {
		<-r.Context().Done()
		return true
	})
	for what, check := range map[string]func(image.Credential) error{
		"manifest": func(cred image.Credential) error { return m.c.Check(t.Context(), m.req.Ref, m.req.Manifest, cred) },
		"tag":      func(cred image.Credential) error { return m.c.Check(t.Context(), m.req.Ref, blockdev.Digest{}, cred) },
	} {
		m.mirror.Forget()
		if err := check(alice); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if n := m.mirror.Requests(); len(n) != 1 {
			t.Errorf("%s: the mirror was asked %v, want once", what, n)
		}
		wantError(t, check(nobody), blockdev.ErrUnauthorized, m.reg.Host)
	}
	m.req.Credential = alice
	if _, err := m.c.Resolve(t.Context(), m.req); err != nil {
		t.Error(err)
	}
}

// TestDeadMirrorOnce: a mirror that is down is asked once for what the registry answers.
func TestDeadMirrorOnce(t *testing.T) {
	m := newMirrored(t)
	m.mirror.Script(rt.Status(http.StatusBadGateway))
	m.reg.SetAuth(rt.Basic, users, onlyAlice)
	m.req.Credential = alice
	man, err := m.c.Resolve(t.Context(), m.req)
	if err != nil {
		t.Fatal(err)
	}
	for what, ask := range map[string]func() error{
		"check": func() error { return m.c.Check(t.Context(), m.req.Ref, m.req.Manifest, alice) },
		"tag":   func() error { return m.c.Check(t.Context(), m.req.Ref, blockdev.Digest{}, alice) },
		"layer": func() error { _, err := fetch(t.Context(), m.c, man, 0, alice, 0); return err },
		"blob":  func() error { return m.c.HasBlob(t.Context(), man, man.Layers[0], alice) },
	} {
		m.mirror.Forget()
		if err := ask(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if n := m.mirror.Requests(); len(n) != 1 {
			t.Errorf("%s: the mirror was asked %v, want once", what, n)
		}
	}
}
