package mirror

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
)

const (
	// timeout is for one request. The supernode gives up a registry after 30 s.
	timeout = 40 * time.Second
	// maxRequests is how many are worked on at a time, and so the memory for
	// documents. containerd asks for a few of each image that is being pulled.
	maxRequests = 64
)

// Credentials gives the node's credential for the registry host of an image
// reference. No credential is the zero value and no error.
type Credentials interface {
	Credential(ctx context.Context, ref string) (blockdev.Credential, error)
}

// Config says what a Mirror answers from. Source is required.
type Config struct {
	Source blockdev.DocumentSource
	// Credentials are passed to Source; nil: anonymous access only.
	Credentials Credentials
	Log         *slog.Logger // nil: no log
	// Registerer, if not nil, takes the metrics.
	Registerer prometheus.Registerer
}

// Mirror answers a registry's read-only API. It is an http.Handler.
type Mirror struct {
	cfg      Config
	log      *slog.Logger
	slots    chan struct{}
	requests *prometheus.CounterVec
}

// New returns a Mirror. An error is that of a metric which is there already.
func New(cfg Config) (*Mirror, error) {
	m := &Mirror{cfg: cfg, log: cfg.Log, slots: make(chan struct{}, maxRequests)}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	m.requests = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "shoal_node_mirror_requests_total",
		Help: "Requests of containerd to the registry mirror, by what was asked for and the HTTP status of the answer.",
	}, []string{"kind", "status"})
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(m.requests); err != nil {
			return nil, fmt.Errorf("mirror: metrics: %w", err)
		}
	}
	return m, nil
}

// ServeHTTP implements http.Handler.
func (m *Mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	h.Set("X-Content-Type-Options", "nosniff")
	kind, status := "other", http.StatusOK
	if err := m.serve(w, r, &kind); err != nil {
		status = m.fail(w, r, err)
	}
	m.requests.WithLabelValues(kind, strconv.Itoa(status)).Inc()
}

func (m *Mirror) serve(w http.ResponseWriter, r *http.Request, kind *string) error {
	t, err := parse(r)
	if err != nil {
		return err
	}
	if t.what == ping {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte("{}")) // who asked may have gone
		return nil
	}
	*kind = string(t.what)
	select {
	case m.slots <- struct{}{}:
		defer func() { <-m.slots }()
	default:
		return &problem{http.StatusServiceUnavailable, codeUnknown, fmt.Sprintf("%d requests are being answered, which is the limit", maxRequests)}
	}
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	doc, err := m.document(ctx, t, r.Method == http.MethodHead)
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", doc.MediaType)
	h.Set("Docker-Content-Digest", doc.Digest.String())
	h.Set("Etag", `"`+doc.Digest.String()+`"`)
	if r.Method == http.MethodHead {
		h.Set("Content-Length", strconv.FormatInt(doc.Size, 10))
		return nil
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(doc.Data))
	return nil
}

// document asks the source, and believes none of it.
func (m *Mirror) document(ctx context.Context, t target, head bool) (*blockdev.Document, error) {
	req := blockdev.DocumentRequest{Ref: t.ref(), Head: head}
	if t.what == blob {
		req.Kind = blockdev.Config
	}
	if m.cfg.Credentials != nil {
		var err error
		if req.Credential, err = m.cfg.Credentials.Credential(ctx, req.Ref); err != nil {
			return nil, fmt.Errorf("this node's credential: %w", err)
		}
	}
	doc, err := m.cfg.Source.Document(ctx, req)
	if err != nil {
		return nil, err
	}
	want := t.digest
	if want == (blockdev.Digest{}) {
		want = doc.Digest
	}
	switch {
	case doc.Digest != want:
		return nil, fmt.Errorf("%s came in its place: %w", doc.Digest, blockdev.ErrCorrupt)
	case head:
		return doc, nil
	case doc.Size != int64(len(doc.Data)) || blockdev.Sum(doc.Data) != want:
		return nil, fmt.Errorf("the %d bytes that came are not those of %s: %w", len(doc.Data), want, blockdev.ErrCorrupt)
	}
	return doc, nil
}

// The codes of the OCI distribution specification that are used here, and
// UNKNOWN, which it inherited.
const (
	codeManifestUnknown = "MANIFEST_UNKNOWN"
	codeBlobUnknown     = "BLOB_UNKNOWN"
	codeNameInvalid     = "NAME_INVALID"
	codeDigestInvalid   = "DIGEST_INVALID"
	codeDenied          = "DENIED"
	codeUnsupported     = "UNSUPPORTED"
	codeUnknown         = "UNKNOWN"
)

// problem is an answer that is an error.
type problem struct {
	status int
	code   string
	text   string
}

func (p *problem) Error() string { return p.text }

// problemOf says how an error of the source is answered.
func problemOf(err error) *problem {
	var p *problem
	text := err.Error()
	switch {
	case errors.As(err, &p):
		return p
	case errors.Is(err, blockdev.ErrUnauthorized):
		return &problem{http.StatusForbidden, codeDenied, text}
	case errors.Is(err, blockdev.ErrUnavailable):
		return &problem{http.StatusServiceUnavailable, codeUnknown, text}
	case errors.Is(err, blockdev.ErrNotFound):
		return &problem{http.StatusNotFound, codeManifestUnknown, text}
	case errors.Is(err, blockdev.ErrUnsupported):
		return &problem{http.StatusNotImplemented, codeUnsupported, text}
	case errors.Is(err, blockdev.ErrCorrupt):
		return &problem{http.StatusBadGateway, codeUnknown, text}
	case errors.Is(err, context.DeadlineExceeded):
		return &problem{http.StatusGatewayTimeout, codeUnknown, text}
	}
	return &problem{http.StatusInternalServerError, codeUnknown, text}
}

// fail answers with err and returns the status. What is said to containerd it
// shows to whoever pulled, if no other host has the answer either.
func (m *Mirror) fail(w http.ResponseWriter, r *http.Request, err error) int {
	p := problemOf(err)
	if p.status == http.StatusNotFound && strings.Contains(r.URL.Path, "/blobs/") {
		p.code = codeBlobUnknown
	}
	level := slog.LevelWarn
	if p.status < 500 && p.status != http.StatusForbidden || r.Context().Err() != nil {
		level = slog.LevelDebug // containerd asks for layers here first, that is all
	}
	m.log.Log(r.Context(), level, "the mirror leaves a request to containerd's next host",
		"request", r.Method+" "+clip(r.URL.Path), "registry", clip(r.URL.Query().Get("ns")), "status", p.status, "error", err)
	type entry struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	body, err := json.Marshal(map[string][]entry{"errors": {{p.code, "shoal's mirror: " + p.text}}})
	if err != nil {
		body = []byte("{}") // strings always marshal
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(p.status)
	_, _ = w.Write(body) // who asked may have gone
	return p.status
}

func clip(s string) string { return s[:min(len(s), 300)] }
