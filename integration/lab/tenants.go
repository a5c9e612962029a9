package lab

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"time"
)

// Tenants is a registry with token auth, in front of another one that has the images:
// what is below a user's name is for that user, and what is below "public" for
// everybody.
type Tenants struct {
	// Addr is host:port; plain HTTP.
	Addr string

	proxy http.Handler

	mu        sync.Mutex
	passwords map[string]string
	tokens    map[string]string // word -> user
	documents map[string][]byte // path -> what is served there in place of the registry's answer
}

// StartTenants starts it in front of r, on r's machine, with these passwords of users.
func (l *Lab) StartTenants(r *Registry, passwords map[string]string) (*Tenants, error) {
	transport := &http.Transport{}
	if r.lab.host != nil {
		transport.DialContext = r.lab.host.Dial
	}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: r.Addr})
	proxy.Transport = transport
	g := &Tenants{proxy: proxy, passwords: passwords, tokens: map[string]string{}, documents: map[string][]byte{}}
	ip, _, err := net.SplitHostPort(r.Addr)
	if err != nil {
		return nil, err
	}
	var ln net.Listener
	if err := r.lab.inHost(func() error {
		ln, err = net.Listen("tcp", net.JoinHostPort(ip, "0"))
		return err
	}); err != nil {
		return nil, err
	}
	g.Addr = ln.Addr().String()
	server := &http.Server{Handler: g, ReadHeaderTimeout: time.Minute}
	done := make(chan error, 1)
	go func() { done <- server.Serve(ln) }()
	l.OnClose(func() error {
		err := server.Close()
		transport.CloseIdleConnections()
		if served := <-done; !errors.Is(served, http.ErrServerClosed) {
			err = errors.Join(err, served)
		}
		return err
	})
	return g, nil
}

// Rotate exchanges a user's password; tokens that were got with the old one end.
func (g *Tenants) Rotate(user, password string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.passwords[user] = password
	for word, owner := range g.tokens {
		if owner == user {
			delete(g.tokens, word)
		}
	}
}

// Serve has a document be served at a path, which begins with the repository.
func (g *Tenants) Serve(path string, document []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.documents[path] = document
}

// ServeHTTP implements http.Handler.
func (g *Tenants) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.URL.Path == "/token" {
		g.token(w, r)
		return
	}
	word, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	path := strings.TrimPrefix(r.URL.Path, "/v2/")
	owner, _, _ := strings.Cut(path, "/")
	if user, known := g.tokens[word]; owner != "public" && (!known || user != owner) || owner == "public" && !known {
		repository, _, _ := strings.Cut(path, "/manifests/")
		repository, _, _ = strings.Cut(repository, "/blobs/")
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="lab",scope="repository:%s:pull"`, g.Addr, repository))
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"this registry refuses"}]}`, http.StatusUnauthorized)
		return
	}
	if doc, ok := g.documents[path]; ok {
		mediaType := MediaTypeManifest
		if strings.Contains(path, "/blobs/") {
			mediaType = "application/octet-stream"
		}
		w.Header().Set("Content-Type", mediaType)
		w.Header().Set("Docker-Content-Digest", NewBlob("", doc).Digest)
		w.Header().Set("Content-Length", fmt.Sprint(len(doc)))
		if r.Method != http.MethodHead {
			_, _ = w.Write(doc) // the client may have gone
		}
		return
	}
	g.mu.Unlock()
	defer g.mu.Lock()
	g.proxy.ServeHTTP(w, r)
}

// token gives a token out: to nobody in particular, or to a user with the right
// password.
func (g *Tenants) token(w http.ResponseWriter, r *http.Request) {
	user, password, ok := r.BasicAuth()
	switch {
	case r.Method != http.MethodGet: // as with many registries, so that clients take the other way
		http.Error(w, "use GET", http.StatusMethodNotAllowed)
	case ok && (password == "" || g.passwords[user] != password):
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
	default:
		word := fmt.Sprintf("token-%d-%d", len(g.tokens), time.Now().UnixNano())
		g.tokens[word] = user
		fmt.Fprintf(w, `{"token":%q,"expires_in":60}`, word)
	}
}
