package registrytest

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// Auth is how a Fake lets people in.
type Auth int

// The ways.
const (
	Open Auth = iota
	Basic
	Bearer
)

// Fake is a registry in this process. Set its fields before the first request,
// or through Set.
type Fake struct {
	Target
	srv *httptest.Server

	mu        sync.Mutex
	auth      Auth
	users     map[string]string // name -> password
	readable  func(user, repo string) bool
	blobs     map[string][]byte // repo@digest
	manifests map[string]doc    // repo:tag and repo@digest
	hook      func(w http.ResponseWriter, r *http.Request) bool
	log       []string
	headers   []http.Header
	tokens    int // given out
	expired   int // of these, the first so many are good no more
}

type doc struct {
	mediaType string
	data      []byte
}

// NewFake starts a registry on loopback over plain HTTP that ends with the test.
func NewFake(t testing.TB) *Fake {
	f := newFake()
	f.srv = httptest.NewServer(f)
	f.Host = f.srv.Listener.Addr().String()
	t.Cleanup(f.srv.Close)
	return f
}

// NewFakeAt is NewFake at this host:port; the port may be 0.
func NewFakeAt(t testing.TB, addr string) *Fake {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	f := newFake()
	f.srv = &httptest.Server{Listener: ln, Config: &http.Server{Handler: f}}
	f.srv.Start()
	f.Host = ln.Addr().String()
	t.Cleanup(f.srv.Close)
	return f
}

// NewFakeTLS is NewFake over TLS with a certificate that nobody trusts.
func NewFakeTLS(t testing.TB, change ...func(*tls.Config)) *Fake {
	f := newFake()
	f.srv = httptest.NewUnstartedServer(f)
	f.srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError) // handshakes that fail are what is tested
	f.srv.TLS = &tls.Config{}
	for _, c := range change {
		c(f.srv.TLS)
	}
	f.srv.StartTLS()
	f.Host = f.srv.Listener.Addr().String()
	t.Cleanup(f.srv.Close)
	return f
}

func newFake() *Fake {
	return &Fake{users: map[string]string{}, readable: func(string, string) bool { return true },
		blobs: map[string][]byte{}, manifests: map[string]doc{}}
}

// Close ends the server; the registry is down from then on.
func (f *Fake) Close() { f.srv.CloseClientConnections(); f.srv.Close() }

// SetAuth sets which user may read what: the user is "" for anonymous requests.
// Pushing needs no permission.
func (f *Fake) SetAuth(a Auth, users map[string]string, readable func(user, repo string) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.auth, f.users, f.readable = a, users, readable
}

// Expire ends all tokens that were given out.
func (f *Fake) Expire() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.expired = f.tokens
}

// Expired says whether that has been.
func (f *Fake) Expired() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.expired > 0
}

// SetHook installs what sees each request first; it returns true if it answered.
func (f *Fake) SetHook(h func(w http.ResponseWriter, r *http.Request) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = h
}

// Requests returns "METHOD path" of all requests so far whose text contains all
// of the parts.
func (f *Fake) Requests(parts ...string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
next:
	for _, l := range f.log {
		for _, p := range parts {
			if !strings.Contains(l, p) {
				continue next
			}
		}
		out = append(out, l)
	}
	return out
}

// Headers returns the headers of all requests so far.
func (f *Fake) Headers() []http.Header {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]http.Header(nil), f.headers...)
}

// Forget empties the log of requests.
func (f *Fake) Forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log, f.headers = nil, nil
}

// SetBlob puts other bytes where a blob was, or removes it (nil).
func (f *Fake) SetBlob(repo string, d blockdev.Digest, b []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b == nil {
		delete(f.blobs, repo+"@"+d.String())
		return
	}
	f.blobs[repo+"@"+d.String()] = b
}

// SetManifest puts a manifest under a tag and a digest that need not be its own.
func (f *Fake) SetManifest(repo, tag, mediaType string, d blockdev.Digest, b []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.manifests[repo+":"+tag] = doc{mediaType, b}
	f.manifests[repo+"@"+d.String()] = doc{mediaType, b}
}

// ServeHTTP implements http.Handler.
func (f *Fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.log = append(f.log, r.Method+" "+r.URL.Path)
	f.headers = append(f.headers, r.Header.Clone())
	hook := f.hook
	f.mu.Unlock()
	if hook != nil && hook(w, r) {
		return
	}
	if r.URL.Path == "/token" {
		f.token(w, r)
		return
	}
	p, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	if !ok {
		Fail(w, http.StatusNotFound, "UNSUPPORTED")
		return
	}
	for _, kind := range []string{"/blobs/uploads/", "/blobs/", "/manifests/"} {
		repo, ref, ok := strings.Cut(p, kind)
		if !ok {
			continue
		}
		if r.Method == http.MethodGet || r.Method == http.MethodHead {
			if !f.allowed(w, r, repo) {
				return
			}
		}
		switch kind {
		case "/blobs/uploads/":
			f.upload(w, r, repo)
		case "/blobs/":
			f.blob(w, r, repo, ref)
		default:
			f.manifest(w, r, repo, ref)
		}
		return
	}
	Fail(w, http.StatusNotFound, "UNSUPPORTED")
}

// Fail answers with a status and a registry's error body.
func Fail(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"for tests"}]}`, code) // the client may be gone
}

func (f *Fake) allowed(w http.ResponseWriter, r *http.Request, repo string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch f.auth {
	case Basic:
		user, pass, ok := r.BasicAuth()
		if ok && f.users[user] != "" && f.users[user] == pass || !ok && f.readable("", repo) {
			if f.readable(user, repo) {
				return true
			}
			Fail(w, http.StatusForbidden, "DENIED")
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="fake"`)
		Fail(w, http.StatusUnauthorized, "UNAUTHORIZED")
		return false
	case Bearer:
		tok, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		scope := "repository:" + repo + ":pull"
		challenge := fmt.Sprintf(`Bearer realm="http://%s/token",service="fake",scope=%q`, f.Host, scope)
		if b, err := base64.RawURLEncoding.DecodeString(tok); err == nil && tok != "" {
			n := 0
			_, err := fmt.Sscanf(string(b), "%d ", &n)
			switch {
			case err != nil || n <= f.expired:
				challenge += `,error="invalid_token"`
			case strings.HasSuffix(string(b), " "+scope):
				return true
			}
		}
		w.Header().Set("WWW-Authenticate", challenge)
		Fail(w, http.StatusUnauthorized, "UNAUTHORIZED")
		return false
	}
	return true
}

// token is the token server: GET with basic authentication, or POST with a
// password or refresh token.
func (f *Fake) token(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	user, pass, _ := r.BasicAuth()
	scope := r.URL.Query().Get("scope")
	if r.Method == http.MethodPost {
		scope = r.PostFormValue("scope")
		user, pass = r.PostFormValue("username"), r.PostFormValue("password")
		if rt := r.PostFormValue("refresh_token"); rt != "" {
			user, pass, _ = strings.Cut(rt, "/")
		}
	}
	if user != "" && (f.users[user] == "" || f.users[user] != pass) {
		Fail(w, http.StatusUnauthorized, "UNAUTHORIZED")
		return
	}
	granted := ""
	repo := strings.TrimSuffix(strings.TrimPrefix(scope, "repository:"), ":pull")
	if f.readable(user, repo) {
		granted = scope
	}
	f.tokens++
	tok := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%d user=%s %s", f.tokens, user, granted))
	_, _ = fmt.Fprintf(w, `{"token":%q,"access_token":%q,"expires_in":300}`, tok, tok) // the client may be gone
}

func (f *Fake) upload(w http.ResponseWriter, r *http.Request, repo string) {
	switch r.Method {
	case http.MethodPost:
		w.Header().Set("Location", "/v2/"+repo+"/blobs/uploads/1?state=x")
		w.WriteHeader(http.StatusAccepted)
	case http.MethodPut:
		b, err := io.ReadAll(r.Body)
		if err != nil || blockdev.Sum(b).String() != r.URL.Query().Get("digest") {
			Fail(w, http.StatusBadRequest, "DIGEST_INVALID")
			return
		}
		f.SetBlob(repo, blockdev.Sum(b), b)
		w.WriteHeader(http.StatusCreated)
	}
}

func (f *Fake) blob(w http.ResponseWriter, r *http.Request, repo, ref string) {
	f.mu.Lock()
	b, ok := f.blobs[repo+"@"+ref]
	f.mu.Unlock()
	if !ok {
		Fail(w, http.StatusNotFound, "BLOB_UNKNOWN")
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
}

func (f *Fake) manifest(w http.ResponseWriter, r *http.Request, repo, ref string) {
	if r.Method == http.MethodPut {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			Fail(w, http.StatusBadRequest, "MANIFEST_INVALID")
			return
		}
		f.SetManifest(repo, ref, r.Header.Get("Content-Type"), blockdev.Sum(b), b)
		w.WriteHeader(http.StatusCreated)
		return
	}
	key := repo + ":" + ref
	if strings.HasPrefix(ref, "sha256:") {
		key = repo + "@" + ref
	}
	f.mu.Lock()
	d, ok := f.manifests[key]
	f.mu.Unlock()
	if !ok || !strings.Contains(r.Header.Get("Accept"), d.mediaType) && !strings.HasPrefix(d.mediaType, "text/") {
		Fail(w, http.StatusNotFound, "MANIFEST_UNKNOWN")
		return
	}
	w.Header().Set("Content-Type", d.mediaType)
	w.Header().Set("Docker-Content-Digest", blockdev.Sum(d.data).String())
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(d.data))
}
