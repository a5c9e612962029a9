package registry_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	rt "github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestTroubleOfOne: what a registry answers for one repository or one credential keeps no tag of
// others from being asked. If it does not answer, then its other tags are not asked for a while.
func TestTroubleOfOne(t *testing.T) {
	gone := func(w http.ResponseWriter, _ *http.Request) bool {
		if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
			conn.Close()
		}
		return true
	}
	for _, tc := range []struct {
		name    string
		odd     rt.Odd
		cred    image.Credential // that has the trouble
		repo    string           // of alice, asked then
		unasked bool
	}{
		{"a limit for one credential", rt.Status(429, "Retry-After", "100"), nobody, "private", false},
		{"a limit for one credential, the same repository", rt.Status(429, "Retry-After", "100"), nobody, "open", false},
		{"an error of one repository", rt.Status(503, "Retry-After", "100"), alice, "private", false},
		{"an error of this repository", rt.Status(503, "Retry-After", "100"), alice, "open", true},
		{"an odd status of one repository", rt.Status(418, "Retry-After", "100"), alice, "private", false},
		{"no answer to another credential", gone, nobody, "private", false},
		{"no answer", gone, alice, "private", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			f := rt.NewFake(t)
			l := rt.GzipLayer(t, "file", 10, 1)
			f.Push(t, "open", "v1", l)
			f.Push(t, "private", "v1", l)
			c := newClient(t, func(cfg *registry.Config) { cfg.TagTTL = time.Nanosecond })
			means := func(repo string, cred image.Credential) blockdev.Digest {
				t.Helper()
				m, err := c.Resolve(t.Context(), image.Request{Ref: f.Host + "/" + repo + ":v1", Platform: amd64, Credential: cred})
				if err != nil {
					t.Fatal(err)
				}
				return m.Digest
			}
			before := means("open", tc.cred)
			if means("private", alice) != before {
				t.Fatal("the test's two images are not the same")
			}
			f.SetHook(tc.odd)
			if means("open", tc.cred) != before {
				t.Error("the tag names something else while the registry is in trouble")
			}
			f.SetHook(nil)
			moved := f.Push(t, tc.repo, "v1", l, rt.GzipLayer(t, "more", 10, 2))
			f.Forget()
			got := means(tc.repo, alice)
			switch asked := len(f.Requests("HEAD")) > 0; {
			case asked == tc.unasked:
				t.Errorf("the registry was asked: %t", asked)
			case asked && got != moved, !asked && got != before:
				t.Errorf("the tag names %s", got)
			}
		})
	}
}
