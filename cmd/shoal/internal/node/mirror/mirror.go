package mirror

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/metric"
	"github.com/shoalfs/shoal/snapshotter/policy"
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
	Credential(ctx context.Context, ref string) (image.Credential, error)
}

// Opener opens images before containerd asks for their layers. A name is host and
// repository.
type Opener interface {
	// Show says that a pull was given this manifest, or image index, on the word of
	// the registry for this credential.
	Show(name string, manifest blockdev.Digest, cred image.Credential)
	// Begin begins to open the image with this manifest on the word of this
	// credential, unless it is open or being opened, and returns at once. tag may be
	// empty. layers are digests of its layers; nil: they are not known.
	Begin(name, tag string, manifest blockdev.Digest, layers []blockdev.Digest, cred image.Credential)
	// Await returns when containerd may begin to unpack the image: it is open, it
	// cannot be opened, or ctx has ended.
	Await(ctx context.Context, name string, manifest blockdev.Digest)
}

// Config says what a Mirror answers from. Source is required.
type Config struct {
	Source image.DocumentSource
	// Opener, if not nil, opens the images that are pulled.
	Opener Opener
	// NodeCredentials, if not nil, are used where a pull's own credential opens
	// nothing: all users that can pull on this machine can then pull what they open.
	NodeCredentials Credentials
	// Remote: the source is on another machine, where names like localhost mean
	// something else. They are left to containerd's next host.
	Remote bool
	// Address is the mirror's host:port. Requests that name another host are turned
	// away, but for the loopback names; empty: no request is.
	Address string
	Log     *slog.Logger // nil: no log
	// Registerer, if not nil, takes the metrics.
	Registerer prometheus.Registerer
}

// Mirror answers a registry's read-only API. It is an http.Handler.
type Mirror struct {
	cfg      Config
	log      *slog.Logger
	slots    chan struct{}
	held     chan struct{}
	pace     time.Duration
	now      func() time.Time
	names    []string // hosts that it is asked by; nil: any
	tokens   *tokens
	known    *known
	health   health
	requests *prometheus.CounterVec
}

// New returns a Mirror. An error is that of a metric which is there already.
func New(cfg Config) (*Mirror, error) {
	m := &Mirror{
		cfg: cfg, log: cfg.Log, tokens: newTokens(), known: newKnown(), slots: make(chan struct{}, maxRequests), held: make(chan struct{}, maxHeld), pace: pace, now: time.Now,
		health: health{patience: patience, impatience: impatience},
	}
	defaults.Log(&m.log)
	if cfg.Address != "" {
		m.names = hosts(cfg.Address)
	}
	m.requests = metric.CounterVec("shoal_node_mirror_requests_total",
		"Requests of containerd to the registry mirror, by what was asked for and the HTTP status of the answer. 401 is the first answer to every pull.",
		"kind", "status")
	set := metric.Set{Registerer: cfg.Registerer}
	if err := set.Register(m.requests); err != nil {
		return nil, fmt.Errorf("mirror: %w", err)
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
	if !m.mine(r.Host) {
		return &problem{http.StatusMisdirectedRequest, codeUnsupported, fmt.Sprintf("%.80q is not this mirror", r.Host)}
	}
	if r.URL.Path == "/token" {
		*kind = "token"
		return m.token(w, r)
	}
	t, err := parse(r)
	if err != nil {
		return err
	}
	if t.what == ping {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte("{}")) // the client may have gone
		return nil
	}
	*kind = string(t.what)
	host, _, _ := strings.Cut(t.name, "/")
	if m.cfg.Remote && policy.LocalHost(host) {
		return &problem{http.StatusNotFound, codeManifestUnknown, host + " is a name that only this machine knows, and the supernode runs on another machine"}
	}
	var manifest blockdev.Digest
	if t.what == blob {
		var ok bool
		if manifest, ok = m.known.config(t); !ok {
			return &problem{http.StatusNotFound, codeBlobUnknown, "not the config of a manifest that was given out here: layers come from the registry"}
		}
	}
	cred, err := m.credential(r, t)
	if err != nil {
		return err
	}
	head := r.Method == http.MethodHead
	doc, cred, err := m.ask(r.Context(), host, t, head, cred)
	if err != nil {
		if m.cfg.Opener != nil && errors.Is(err, errLate) && t.what != blob && !head && t.tag == "" && isManifest(r.Header.Get("Accept")) {
			// The answer is late, and the image is still opened, for the Prepare
			// that follows. Whether this credential may have it is asked then, too.
			m.cfg.Opener.Begin(t.name, m.known.tag(t.name, t.digest), t.digest, nil, cred)
		}
		return err
	}
	if m.cfg.Opener != nil && t.what != blob {
		m.cfg.Opener.Show(t.name, doc.Digest, cred)
		if layers, ok := m.known.note(t, doc); ok {
			m.cfg.Opener.Begin(t.name, m.known.tag(t.name, doc.Digest), doc.Digest, layers, cred)
		} else if head && cred != (image.Credential{}) && images.IsIndexType(doc.MediaType) {
			m.showListed(r.Context(), host, target{what: t.what, name: t.name, digest: doc.Digest}, cred)
		}
	} else if t.what != blob {
		m.known.note(t, doc)
	}
	h := w.Header()
	h.Set("Content-Type", doc.MediaType)
	h.Set("Docker-Content-Digest", doc.Digest.String())
	h.Set("Etag", `"`+doc.Digest.String()+`"`)
	switch {
	case head:
		h.Set("Content-Length", strconv.FormatInt(doc.Size, 10))
	case t.what == blob && m.cfg.Opener != nil:
		m.giveConfig(w, r, t, doc, manifest)
	default:
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(doc.Data))
	}
	return nil
}

// mine says whether a request's Host is one of the mirror's names: a browser on this
// machine may be led here under another one.
func (m *Mirror) mine(host string) bool {
	if m.names == nil {
		return true
	}
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return slices.Contains(m.names, strings.ToLower(strings.Trim(host, "[]")))
}

// isManifest says whether containerd expects an image manifest: it names the type
// that it has from an image index, or from its first question, before all others.
func isManifest(accept string) bool {
	first, _, _ := strings.Cut(accept, ",")
	return images.IsManifestType(strings.TrimSpace(first))
}

// errLate is for a question whose answer is not waited for.
var errLate = fmt.Errorf("no answer yet: %w", blockdev.ErrUnavailable)

// ask asks the source, and waits for it for a moment. The question goes on when it
// is not waited for: the answer may be at hand for the next one of the same pull. It
// returns the credential that has opened the document.
func (m *Mirror) ask(ctx context.Context, host string, t target, head bool, cred image.Credential) (*image.Document, image.Credential, error) {
	select {
	case m.slots <- struct{}{}:
	default:
		return nil, cred, fmt.Errorf("%d requests are being answered, which is the limit: %w", maxRequests, blockdev.ErrUnavailable)
	}
	wait, ok := m.health.begin(host, m.now())
	if !ok {
		<-m.slots
		return nil, cred, errLate
	}
	type answer struct {
		doc  *image.Document
		cred image.Credential
		err  error
	}
	began := m.now()
	done := make(chan answer, 1)
	// Not the request's: the first client may leave.
	qctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	go func() {
		defer func() { <-m.slots }()
		defer cancel()
		doc, cred, err := m.question(qctx, t, head, cred)
		m.health.end(host, !errors.Is(err, blockdev.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) && m.now().Sub(began) < wait)
		done <- answer{doc, cred, err}
	}()
	select {
	case a := <-done:
		return a.doc, a.cred, a.err
	case <-time.After(wait):
		if m.health.late(host, m.now()) {
			m.log.Warn("the supernode did not answer in time, so containerd asks the registry itself; for a while, pulls wait less for the supernode", "registry", host)
		}
		return nil, cred, errLate
	case <-ctx.Done():
		return nil, cred, ctx.Err()
	}
}

// question asks with the pull's credential, and where that opens nothing with the
// node's, if the config wants that.
func (m *Mirror) question(ctx context.Context, t target, head bool, cred image.Credential) (*image.Document, image.Credential, error) {
	doc, err := m.document(ctx, t, head, cred)
	if m.cfg.NodeCredentials == nil || !errors.Is(err, blockdev.ErrUnauthorized) && !errors.Is(err, blockdev.ErrNotFound) {
		return doc, cred, err
	}
	node, cerr := m.cfg.NodeCredentials.Credential(ctx, t.ref())
	if cerr != nil || node == (image.Credential{}) || node == cred {
		return doc, cred, errors.Join(err, cerr)
	}
	doc, err = m.document(ctx, t, head, node)
	return doc, node, err
}

// document asks the source, and believes none of it.
func (m *Mirror) document(ctx context.Context, t target, head bool, cred image.Credential) (*image.Document, error) {
	req := image.DocumentRequest{Ref: t.ref(), Head: head, Credential: cred}
	if t.what == blob {
		req.Kind = image.ConfigDocument
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
		return nil, fmt.Errorf("%s came instead: %w", doc.Digest, blockdev.ErrCorrupt)
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
	case errors.Is(err, blockdev.ErrNotFound):
		return &problem{http.StatusNotFound, codeManifestUnknown, text}
	case errors.Is(err, blockdev.ErrUnsupported):
		return &problem{http.StatusNotImplemented, codeUnsupported, text}
	case errors.Is(err, blockdev.ErrCorrupt):
		return &problem{http.StatusBadGateway, codeUnknown, text}
	}
	return &problem{http.StatusInternalServerError, codeUnknown, text}
}

// refusal is the challenge that leaves a request to containerd's next host; nil:
// the error is answered in another way.
func refusal(r *http.Request, err error) *challenge {
	var c *challenge
	if errors.As(err, &c) {
		return c
	}
	why := ""
	switch {
	case errors.As(err, new(*problem)):
		return nil
	case errors.Is(err, blockdev.ErrUnauthorized):
		// If the registry's token server refuses the pull, too, then containerd shows this text
		// and not the registry's answer.
		why = quotable(err.Error())
	case errors.Is(err, blockdev.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		why = "shoal's mirror leaves this to the registry, because its supernode has no answer"
	default:
		return nil
	}
	t, perr := parse(r)
	if perr != nil {
		return nil
	}
	return &challenge{target: t, why: why}
}

// fail answers with err and returns the status. What is said to containerd it
// shows to the user that pulled, if no other host has the answer either.
func (m *Mirror) fail(w http.ResponseWriter, r *http.Request, err error) int {
	c := refusal(r, err)
	var p *problem
	if c != nil {
		p = &problem{http.StatusUnauthorized, codeDenied, err.Error()}
		w.Header().Set("WWW-Authenticate", c.header(r))
	} else {
		p = problemOf(err)
	}
	if p.status == http.StatusNotFound && strings.Contains(r.URL.Path, "/blobs/") {
		p.code = codeBlobUnknown
	}
	level := slog.LevelWarn
	switch {
	case p.status < 500, p.status == http.StatusLoopDetected, r.Context().Err() != nil:
		level = slog.LevelDebug // so every pull goes
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
	_, _ = w.Write(body) // the client may have gone
	return p.status
}

// quotable is a text as it may stand between quotes in a header.
func quotable(s string) string {
	return clip(strings.Map(func(r rune) rune {
		switch {
		case r == '"' || r == '\\':
			return '\''
		case r < ' ' || r > '~':
			return ' '
		}
		return r
	}, s))
}

func clip(s string) string { return s[:min(len(s), 300)] }
