package layers

import (
	"encoding/base64"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry/registrytest"
)

// TestLimitedWithoutCredential: a registry that limits those without a credential gives a
// layer to a caller that has one, also if the others have asked first; and to the others then.
func TestLimitedWithoutCredential(t *testing.T) {
	f, l := registrytest.NewFake(t), registrytest.GzipLayer(t, "l", 1000, 1)
	f.Push(t, "x", "v1", l)
	alice := image.Credential{Username: "alice", Secret: "secret-of-alice"}
	f.SetAuth(registrytest.Bearer, map[string]string{alice.Username: alice.Secret}, func(string, string) bool { return true })
	asked, joined := make(chan struct{}), make(chan struct{})
	ask, join := sync.OnceFunc(func() { close(asked) }), sync.OnceFunc(func() { close(joined) })
	f.Script(registrytest.On(http.MethodGet, "/blobs/", func(w http.ResponseWriter, r *http.Request) bool {
		token, _ := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
		if !strings.Contains(string(token), "user= ") {
			return false
		}
		ask()
		<-joined
		return registrytest.Status(http.StatusTooManyRequests, "Retry-After", "3600")(w, r)
	}))
	r := newRig(t)
	ensure := func(c image.Credential, watch func(image.Progress)) {
		req := listed(f, l, int64(len(l.Blob)))
		req.Credential, req.Watch = c, watch
		if release, err := r.Ensure(t.Context(), req); err != nil {
			t.Errorf("%q: %v", c.Username, err)
			join()
		} else {
			release()
		}
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { ensure(image.Credential{}, nil) })
	<-asked
	wg.Go(func() { ensure(alice, func(image.Progress) { join() }) })
}
