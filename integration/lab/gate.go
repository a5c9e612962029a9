package lab

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"time"
)

// Gate is a registry in front of a registry, which can stop to give out the blobs of a
// repository: requests for them hang, as with a registry that is overloaded.
type Gate struct {
	// Addr is host:port; plain HTTP.
	Addr string

	mu sync.Mutex
	// shut are the repositories whose blobs hang.
	shut map[string]bool
}

// NewGate starts one that passes everything on to r. It ends with the lab.
func (l *Lab) NewGate(r *Registry) (*Gate, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	g := &Gate{Addr: ln.Addr().String(), shut: make(map[string]bool)}
	target := &url.URL{Scheme: "http", Host: r.Addr}
	proxy := &httputil.ReverseProxy{Rewrite: func(p *httputil.ProxyRequest) {
		p.SetURL(target)
		p.Out.Host = p.In.Host
	}}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if g.hangs(r.URL.Path) {
			select {
			case <-r.Context().Done():
			case <-ctx.Done():
			}
			panic(http.ErrAbortHandler)
		}
		proxy.ServeHTTP(w, r)
	})}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ln) }()
	l.OnClose(func() error {
		stop()
		err := srv.Close()
		if served := <-ended; !errors.Is(served, http.ErrServerClosed) {
			err = errors.Join(err, served)
		}
		return err
	})
	return g, nil
}

// Shut has all further requests for blobs of a repository hang.
func (g *Gate) Shut(repository string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut[repository] = true
}

func (g *Gate) hangs(path string) bool {
	repository, _, blobs := strings.Cut(strings.TrimPrefix(path, "/v2/"), "/blobs/")
	g.mu.Lock()
	defer g.mu.Unlock()
	return blobs && g.shut[repository]
}
