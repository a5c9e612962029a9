package mirror

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/snapshotter/images"
)

var _ Opener = (*images.Catalogue)(nil)

// source is a image.DocumentSource made of a function.
type source func(ctx context.Context, req image.DocumentRequest) (*image.Document, error)

func (f source) Document(ctx context.Context, req image.DocumentRequest) (*image.Document, error) {
	return f(ctx, req)
}

var (
	manifestBytes = []byte(`{"schemaVersion":2}`)
	manifestID    = blockdev.Sum(manifestBytes)
)

const mediaType = "application/vnd.oci.image.manifest.v1+json"

func answers(b []byte) source {
	return func(_ context.Context, req image.DocumentRequest) (*image.Document, error) {
		doc := &image.Document{Digest: manifestID, MediaType: mediaType, Size: int64(len(b))}
		if !req.Head {
			doc.Data = b
		}
		return doc, nil
	}
}

// pullCredential is what the tests' pulls have.
var pullCredential = image.Credential{Username: "u", Secret: "s"}

// newMirror is one that waits for its source, and whose tests need not be quick.
func newMirror(t *testing.T, cfg Config) *Mirror {
	t.Helper()
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.health.patience = time.Minute
	return m
}

// tokenFor is a token that containerd gets for a pull.
func tokenFor(t *testing.T, m *Mirror, service, repo string, cred image.Credential) string {
	t.Helper()
	form := url.Values{"service": {service}, "scope": {"repository:" + repo + ":pull"}, "client_id": {"containerd-client"}}
	method, target, body := http.MethodGet, "/token?"+form.Encode(), ""
	if cred.Secret != "" {
		form.Set("grant_type", "password")
		form.Set("username", cred.Username)
		form.Set("password", cred.Secret)
		method, target, body = http.MethodPost, "/token", form.Encode()
	}
	r := httptest.NewRequestWithContext(t.Context(), method, target, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	w := httptest.NewRecorder()
	m.ServeHTTP(w, r)
	var got struct {
		Token   string `json:"access_token"`
		Expires int    `json:"expires_in"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != http.StatusOK || got.Token == "" || got.Expires < 60 {
		t.Fatalf("token: %d %s: %v", w.Code, w.Body, err)
	}
	return got.Token
}

// send sends a request with a pull's token, where it is one for a repository.
func send(t *testing.T, m *Mirror, method, url string, cred image.Credential, change ...func(*http.Request)) (*http.Response, string) {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, url, nil)
	if g, err := parse(r); err == nil && g.name != "" {
		host, repo, _ := strings.Cut(g.name, "/")
		r.Header.Set("Authorization", "Bearer "+tokenFor(t, m, host, repo, cred))
	}
	for _, f := range change {
		f(r)
	}
	w := httptest.NewRecorder()
	m.ServeHTTP(w, r)
	resp := w.Result()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

func do(t *testing.T, s image.DocumentSource, method, url string, change ...func(*http.Request)) (*http.Response, string) {
	t.Helper()
	m := newMirror(t, Config{Source: s})
	if r := httptest.NewRequestWithContext(t.Context(), method, url, nil); strings.Contains(r.URL.Path, "/blobs/") {
		if g, err := parse(r); err == nil {
			m.known.note(target{name: g.name}, &image.Document{Digest: blockdev.Digest{1}, Data: []byte(`{"config":{"digest":"` + g.digest.String() + `"}}`)})
		}
	}
	return send(t, m, method, url, pullCredential, change...)
}

func TestAnswers(t *testing.T) {
	var got image.DocumentRequest
	s := source(func(ctx context.Context, req image.DocumentRequest) (*image.Document, error) {
		got = req
		return answers(manifestBytes)(ctx, req)
	})
	byDigest := "@" + manifestID.String()
	for _, c := range []struct {
		path, ref string
		kind      image.DocumentKind
	}{
		{"/v2/library/redis/manifests/7?ns=docker.io", "docker.io/library/redis:7", image.ManifestDocument},
		{"/v2/a/manifests/v1?ns=Reg.Test:5000", "reg.test:5000/a:v1", image.ManifestDocument},
		{"/v2/a/manifests/" + manifestID.String() + "?ns=reg.test", "reg.test/a" + byDigest, image.ManifestDocument},
		{"/v2/a/manifests/b/manifests/x?ns=[::1]:5000", "[::1]:5000/a/manifests/b:x", image.ManifestDocument},
		{"/v2/a/blobs/blobs/" + manifestID.String() + "?ns=reg.test", "reg.test/a/blobs" + byDigest, image.ConfigDocument},
	} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			resp, body := do(t, s, method, c.path)
			head := method == http.MethodHead
			want := image.DocumentRequest{Ref: c.ref, Kind: c.kind, Head: head, Credential: pullCredential}
			if resp.StatusCode != http.StatusOK || !reflect.DeepEqual(got, want) {
				t.Errorf("%s %s: %s %s, asked for %+v", method, c.path, resp.Status, body, got)
			}
			for h, want := range map[string]string{"Content-Type": mediaType, "Docker-Content-Digest": manifestID.String(), "Content-Length": fmt.Sprint(len(manifestBytes))} {
				if v := resp.Header.Get(h); v != want {
					t.Errorf("%s %s: %s is %q", method, c.path, h, v)
				}
			}
			if !head && body != string(manifestBytes) || head && body != "" {
				t.Errorf("%s %s: body %q", method, c.path, body)
			}
		}
	}
	if resp, body := do(t, s, http.MethodGet, "/v2/"); resp.StatusCode != http.StatusOK || body != "{}" {
		t.Errorf("/v2/: %s %q", resp.Status, body)
	}
}

// wantProblem fails unless an answer is an error of the distribution
// specification's form.
func wantProblem(t *testing.T, resp *http.Response, body string, status int, code string) {
	t.Helper()
	var e struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.Unmarshal([]byte(body), &e); err != nil || len(e.Errors) != 1 {
		t.Fatalf("%s: body %q: %v", resp.Status, body, err)
	}
	if resp.StatusCode != status || e.Errors[0].Code != code || e.Errors[0].Message == "" || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%s %q, want %d %s", resp.Status, body, status, code)
	}
}

func TestRefuses(t *testing.T) {
	never := source(func(context.Context, image.DocumentRequest) (*image.Document, error) {
		t.Error("the source was asked")
		return nil, errors.New("no")
	})
	id := manifestID.String()
	for _, c := range []struct {
		method, url string
		status      int
		code        string
	}{
		{"GET", "/", 404, codeUnsupported},
		{"GET", "/metrics", 404, codeUnsupported},
		{"GET", "/v2/a/tags/list?ns=r.test", 404, codeUnsupported},
		{"GET", "/v2/a/referrers/" + id + "?ns=r.test", 404, codeUnsupported},
		{"GET", "/v2/_catalog?ns=r.test", 404, codeUnsupported},
		{"POST", "/v2/a/blobs/uploads/?ns=r.test", 405, codeUnsupported},
		{"PUT", "/v2/a/manifests/v1?ns=r.test", 405, codeUnsupported},
		{"DELETE", "/v2/a/manifests/v1?ns=r.test", 405, codeUnsupported},
		{"GET", "/v2/a/manifests/v1", 400, codeNameInvalid},
		{"GET", "/v2/a/manifests/v1?ns=user:pw@r.test", 400, codeNameInvalid},
		{"GET", "/v2/a/manifests/v1?ns=r.test/b", 400, codeNameInvalid},
		{"GET", "/v2/A/manifests/v1?ns=r.test", 400, codeNameInvalid},
		{"GET", "/v2/../etc/manifests/v1?ns=r.test", 400, codeNameInvalid},
		{"GET", "/v2/" + strings.Repeat("a/", 200) + "a/manifests/v1?ns=r.test", 400, codeNameInvalid},
		{"GET", "/v2/a/manifests/" + strings.Repeat("a", 200) + "?ns=r.test", 400, codeDigestInvalid},
		{"GET", "/v2/a/manifests/sha512:00?ns=r.test", 400, codeDigestInvalid},
		{"GET", "/v2/a/blobs/v1?ns=r.test", 400, codeDigestInvalid},
	} {
		t.Run(c.method+" "+c.url, func(t *testing.T) {
			resp, body := do(t, never, c.method, c.url)
			wantProblem(t, resp, body, c.status, c.code)
		})
	}
	t.Run("a supernode's own request", func(t *testing.T) {
		resp, body := do(t, never, "GET", "/v2/a/manifests/v1?ns=r.test", func(r *http.Request) {
			r.Header.Add("Via", "1.1 proxy")
			r.Header.Add("Via", registry.Via)
		})
		wantProblem(t, resp, body, http.StatusLoopDetected, codeUnsupported)
	})
}

// Whatever fails is answered so that containerd asks its next host, and shows what
// that says: so what is no word about the image itself is a refused token, the
// least of all errors. None is 429, which containerd repeats.
func TestErrors(t *testing.T) {
	const manifestURL, blobURL = "/v2/a/manifests/v1?ns=r.test", "/v2/a/blobs/sha256:" + "0000000000000000000000000000000000000000000000000000000000000000?ns=r.test"
	for _, c := range []struct {
		err    error
		url    string
		status int
		code   string
	}{
		{blockdev.ErrNotFound, manifestURL, 404, codeManifestUnknown},
		{blockdev.ErrNotFound, blobURL, 404, codeBlobUnknown},
		{blockdev.ErrUnauthorized, manifestURL, 401, codeDenied},
		{blockdev.ErrUnsupported, manifestURL, 501, codeUnsupported},
		{blockdev.ErrUnavailable, manifestURL, 401, codeDenied},
		{blockdev.ErrCorrupt, manifestURL, 502, codeUnknown},
		{context.DeadlineExceeded, manifestURL, 401, codeDenied},
		{errors.New("strange"), manifestURL, 500, codeUnknown},
	} {
		resp, body := do(t, source(func(context.Context, image.DocumentRequest) (*image.Document, error) {
			return nil, fmt.Errorf("the \"cause\": %w", c.err)
		}), "GET", c.url)
		wantProblem(t, resp, body, c.status, c.code)
		if !strings.Contains(body, "cause") {
			t.Errorf("%s: the answer does not say why", body)
		}
		if v := resp.Header.Get("WWW-Authenticate"); c.status == 401 && !strings.Contains(v, `error="`) {
			t.Errorf("%v: containerd would ask for one more token: %s", c.err, v)
		}
		if v, want := resp.Header.Get("WWW-Authenticate"), `error="the 'cause': `; errors.Is(c.err, blockdev.ErrUnauthorized) && !strings.Contains(v, want) {
			t.Errorf("containerd would not show the registry's refusal: got %s, want %s", v, want)
		}
	}
}

// Bytes that are not what was asked for do not go out.
func TestWrongBytes(t *testing.T) {
	id := manifestID.String()
	other := answers([]byte("other"))
	for _, path := range []string{"manifests/" + id, "manifests/v1", "blobs/" + id} {
		resp, body := do(t, other, "GET", "/v2/a/"+path+"?ns=r.test")
		wantProblem(t, resp, body, http.StatusBadGateway, codeUnknown)
	}
	// By another digest than was asked for, though the bytes fit it.
	wanted := blockdev.Sum([]byte("another"))
	for _, method := range []string{"GET", "HEAD"} {
		resp, _ := do(t, answers(manifestBytes), method, "/v2/a/manifests/"+wanted.String()+"?ns=r.test")
		if resp.StatusCode != http.StatusBadGateway {
			t.Errorf("%s: %s", method, resp.Status)
		}
	}
}

func TestTooManyRequests(t *testing.T) {
	release, began := make(chan struct{}), make(chan struct{})
	s := source(func(ctx context.Context, req image.DocumentRequest) (*image.Document, error) {
		began <- struct{}{}
		<-release
		return answers(manifestBytes)(ctx, req)
	})
	var logs bytes.Buffer
	reg := prometheus.NewRegistry()
	m := newMirror(t, Config{Source: s, Log: slog.New(slog.NewTextHandler(&logs, &slog.HandlerOptions{Level: slog.LevelDebug})), Registerer: reg})
	word := tokenFor(t, m, "r.test", "a", pullCredential)
	get := func() *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/v2/a/manifests/v1?ns=r.test", nil)
		r.Header.Set("Authorization", "Bearer "+word)
		m.ServeHTTP(w, r)
		return w
	}
	done := make(chan int, maxRequests)
	for range maxRequests {
		go func() { done <- get().Code }()
	}
	for range maxRequests {
		<-began
	}
	if w := get(); w.Code != http.StatusUnauthorized {
		t.Errorf("one more request: %d", w.Code)
	}
	close(release)
	for range maxRequests {
		if code := <-done; code != http.StatusOK {
			t.Errorf("one of those within the limit: %d", code)
		}
	}
	if !strings.Contains(logs.String(), "next host") || !strings.Contains(logs.String(), "r.test") {
		t.Errorf("log: %s", logs.String())
	}
	if _, err := New(Config{Source: s, Registerer: reg}); err == nil {
		t.Error("two mirrors on one registerer")
	}
}

func FuzzParse(f *testing.F) {
	for _, p := range []string{"/v2/", "/v2/a/manifests/v1", "/v2/a/b/blobs/" + manifestID.String(), "//v2//manifests/"} {
		f.Add(p, "r.test:5000")
	}
	f.Fuzz(func(t *testing.T, path, ns string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.URL.Path = path
		r.URL.RawQuery = "ns=" + ns
		got, err := parse(r)
		if err != nil {
			if problemOf(err).status < 400 {
				t.Fatal(err)
			}
			return
		}
		if got.what == ping {
			return
		}
		if ref := got.ref(); len(ref) > 1024 || strings.ContainsAny(ref, " \x00\n?#%\\") || strings.Contains(ref, "..") && !strings.Contains(ns+path, "..") {
			t.Fatalf("reference %q", ref)
		}
	})
}
