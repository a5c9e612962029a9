package daemon

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestState: a daemon that starts lives and is not ready; one that is not healthy is
// neither.
func TestState(t *testing.T) {
	s := Starting("it opens its store")
	h := Metrics(prometheus.NewRegistry(), s)
	want := func(when, path string, code int, text string) {
		t.Helper()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		if w.Code != code || !strings.Contains(w.Body.String(), text) {
			t.Errorf("%s: %s answers %d %q", when, path, w.Code, w.Body)
		}
	}
	want("starting", "/healthz", 200, "ok")
	want("starting", "/readyz", 503, "it opens its store")
	var sick, busy error
	s.Set(func() error { return sick }, func() error { return busy })
	want("up", "/healthz", 200, "ok")
	want("up", "/readyz", 200, "ok")
	busy = errors.New("no supernode")
	want("alone", "/healthz", 200, "ok")
	want("alone", "/readyz", 503, "no supernode")
	sick, busy = errors.New("the disk is gone"), nil
	want("sick", "/healthz", 503, "the disk is gone")
	want("sick", "/readyz", 503, "the disk is gone")
}
