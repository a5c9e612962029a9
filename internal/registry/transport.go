package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
)

const (
	maxErrorBody = 16 << 10 // bytes of an error answer that are looked at
	maxTokenBody = 1 << 20  // bytes of a token server's answer, or of any other small one
)

var (
	errStalled = errors.New("the connection stalled")
	errSlow    = errors.New("no complete answer in time")
)

// Via is the value of the HTTP header of this name in each request to a
// registry (RFC 9110, 7.6.3). A node's mirror answers them 508, loop detected:
// a supernode that reads the same hosts.toml as containerd finds the mirror there.
const Via = "1.1 shoal"

var acceptManifests = strings.Join([]string{
	ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex,
	images.MediaTypeDockerSchema2Manifest, images.MediaTypeDockerSchema2ManifestList, "*/*",
}, ", ")

// transport bounds what a registry may do to us: sizes of answers, time without
// a byte, ranges that are not what was asked for, and statuses that containerd's
// resolver would repeat at once (429) or whose facts it would lose (Retry-After).
type transport struct {
	base  http.RoundTripper
	stall time.Duration
	count func(n int64)     // received body bytes; may be nil
	loop  func(host string) // is told of a node's mirror
	plain func(host string) // learns which hosts answer without TLS
}

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	out := req.Clone(ctx)
	what := purpose(req)
	if what == "manifests" {
		// By digest, too, a registry answers 404 for a type that is not accepted.
		out.Header.Set("Accept", acceptManifests)
	}
	// Blobs are compressed as they are, offsets count their own bytes, and a
	// second compression would let a small answer grow without bound.
	out.Header.Set("Accept-Encoding", "identity")
	out.Header.Add("Via", Via)

	timer := time.AfterFunc(t.stall, func() { cancel(errStalled) })
	resp, err := t.base.RoundTrip(out)
	timer.Stop()
	if err != nil {
		if errors.Is(context.Cause(ctx), errStalled) {
			err = &Error{Host: req.URL.Host, kind: blockdev.ErrUnavailable, text: fmt.Sprintf("no answer for %s", t.stall)}
		}
		cancel(nil)
		return nil, err
	}
	if req.URL.Scheme == "http" {
		t.plain(req.URL.Host)
	}
	resp.Request = req
	limit, over := int64(maxTokenBody), blockdev.ErrUnavailable
	switch what {
	case "manifests":
		limit, over = maxManifest+1, blockdev.ErrUnsupported
	case "blobs":
		limit = -1 // its reader knows the size
	}
	resp.Body = newBody(ctx, cancel, resp.Body, t, req.URL.Host, limit, over)
	if err := t.check(req, resp); err != nil {
		_ = resp.Body.Close() // the answer is of no use
		return nil, err
	}
	return resp, nil
}

// purpose is "manifests" or "blobs" as the distribution specification's paths
// have it (.../<name>/manifests/<reference>), and something else for token
// servers. A redirected request has the purpose of the first one: net/http links
// them by Request.Response.
func purpose(req *http.Request) string {
	for i := 0; i < 10 && req.Response != nil && req.Response.Request != nil; i++ {
		req = req.Response.Request
	}
	return path.Base(path.Dir(req.URL.Path))
}

func (t *transport) check(req *http.Request, resp *http.Response) error {
	switch s := resp.StatusCode; {
	case s == http.StatusLoopDetected:
		t.loop(req.URL.Host)
		return &Error{Host: req.URL.Host, Status: s, answered: true, kind: blockdev.ErrUnavailable, text: "this mirror asks the same supernode, so the request would go in a circle"}
	case s == http.StatusForbidden, s == http.StatusRequestTimeout, s == http.StatusTooManyRequests, s >= 500,
		s == http.StatusRequestedRangeNotSatisfiable:
		e := &Error{Host: req.URL.Host, Status: s, kind: kindOf(s), after: retryAfter(resp.Header, time.Now())}
		if s == http.StatusForbidden && redirected(req) {
			e = storageRefuses(req, s)
		}
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // a cut error body has no code, that is all
		e.Code = errorCode(b)
		return e
	}
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		return &Error{Host: req.URL.Host, answered: true, kind: blockdev.ErrUnavailable, text: fmt.Sprintf("sent content encoding %.40q, which was not accepted", enc)}
	}
	want, ok := rangeStart(req.Header.Get("Range"))
	if resp.StatusCode == http.StatusPartialContent {
		got, gok := contentRangeStart(resp.Header.Get("Content-Range"))
		if !ok || !gok || got != want {
			return &Error{Host: req.URL.Host, Status: resp.StatusCode, kind: blockdev.ErrUnavailable,
				text: fmt.Sprintf("sent range %.60q where %.60q was asked for", resp.Header.Get("Content-Range"), req.Header.Get("Range"))}
		}
	} else if ok {
		// A whole answer: containerd skips to the offset unless this header
		// makes it believe otherwise.
		resp.Header.Del("Content-Range")
	}
	return nil
}

// rangeStart reads "bytes=N-", the only form that is sent.
func rangeStart(h string) (int64, bool) {
	s, ok := strings.CutPrefix(h, "bytes=")
	s, ok2 := strings.CutSuffix(s, "-")
	n, err := strconv.ParseInt(s, 10, 64)
	return n, ok && ok2 && err == nil
}

func contentRangeStart(h string) (int64, bool) {
	s, ok := strings.CutPrefix(h, "bytes ")
	s, _, ok2 := strings.Cut(s, "-")
	n, err := strconv.ParseInt(s, 10, 64)
	return n, ok && ok2 && err == nil
}

// body is an answer's body with a size limit (left >= 0) and an end to waiting.
type body struct {
	rc     io.ReadCloser
	ctx    context.Context // the request's; only to find out why it ended
	cancel context.CancelCauseFunc
	stall  time.Duration
	host   string
	left   int64 // bytes still allowed; negative: unlimited
	over   error // what more than left is
	count  func(int64)
	timer  *time.Timer // runs only during a Read
	closed atomic.Bool
}

func newBody(ctx context.Context, cancel context.CancelCauseFunc, rc io.ReadCloser, t *transport, host string, left int64, over error) *body {
	b := &body{rc: rc, ctx: ctx, cancel: cancel, stall: t.stall, host: host, left: left, over: over, count: t.count}
	b.timer = time.AfterFunc(t.stall, func() { cancel(errStalled) })
	b.timer.Stop()
	return b
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, &Error{Host: b.host, answered: true, kind: b.over, text: "the answer is larger than such an answer may be"}
	}
	if b.left > 0 && int64(len(p)) > b.left {
		p = p[:b.left]
	}
	// The timer runs only while we wait for the registry, not while the disk or
	// the decompressor makes the registry wait.
	b.timer.Reset(b.stall)
	n, err := b.rc.Read(p)
	b.timer.Stop()
	if b.left > 0 {
		b.left -= int64(n)
	}
	if n > 0 && b.count != nil {
		b.count(int64(n))
	}
	if err != nil && err != io.EOF && errors.Is(context.Cause(b.ctx), errStalled) {
		err = &Error{Host: b.host, kind: blockdev.ErrUnavailable, text: fmt.Sprintf("no byte for %s", b.stall)}
	}
	return n, err
}

// Close implements io.Closer.
func (b *body) Close() error {
	if b.closed.Swap(true) {
		return nil
	}
	b.timer.Stop()
	err := b.rc.Close()
	b.cancel(nil)
	return err
}

// redirected says whether somebody has sent us here: net/http notes whose answer
// that was.
func redirected(req *http.Request) bool { return req.Response != nil && req.Response.Request != nil }

// storageRefuses is the error of a target of a redirect that wants a credential,
// or finds its signature expired. The registry itself has let us in.
func storageRefuses(req *http.Request, status int) *Error {
	first := req
	for i := 0; i < maxRedirects && redirected(first); i++ {
		first = first.Response.Request
	}
	return &Error{Host: req.URL.Host, Status: status, answered: true, kind: blockdev.ErrUnavailable,
		text: fmt.Sprintf("registry %s redirects there, and this server refuses a request that the registry allowed", first.URL.Host)}
}

const maxRedirects = 10

// keptHeaders may follow a redirect to another origin. Everything else (also
// what a hosts.toml adds, which is often a key) was meant for the registry.
var keptHeaders = map[string]bool{"Accept": true, "Accept-Encoding": true, "Range": true, "User-Agent": true, "Referer": true}

// onlyTLS marks the context of a request whose answer must not come over a
// connection that anybody can write into.
type onlyTLS struct{}

// redirects is what decides about redirects of requests to one registry.
type redirects struct {
	// plain says whether a host has answered without TLS: where containerd tries
	// both, URLs say https in either case.
	plain func(host string) bool
	// authorize, which may be nil, adds what the new origin asked for by itself
	// (anonymous tokens).
	authorize func(context.Context, *http.Request) error
}

// check is http.Client.CheckRedirect. net/http keeps the Authorization header for
// other ports and subdomains of the same name; here the origin (scheme, name and
// port) decides.
func (r redirects) check(req *http.Request, via []*http.Request) error {
	first, last := via[0], via[len(via)-1]
	refuse := func(why string) *Error {
		return &Error{Host: first.URL.Host, answered: true, kind: blockdev.ErrUnavailable, text: why}
	}
	if len(via) >= maxRedirects {
		return refuse(fmt.Sprintf("more than %d redirects", maxRedirects))
	}
	if req.URL.Scheme != "https" && req.URL.Scheme != "http" {
		return refuse(fmt.Sprintf("redirects to a %.20q URL", req.URL.Scheme))
	}
	if r.sameOrigin(req.URL, first.URL) {
		return nil
	}
	if first.Method == http.MethodPost {
		return refuse("its token server redirects a request that holds a credential")
	}
	down := r.scheme(last.URL) == "https" && req.URL.Scheme == "http" && !loopback(req.URL.Hostname())
	if down && (purpose(req) != "blobs" || req.Context().Value(onlyTLS{}) != nil) {
		// Blobs are checked by digest, from each sender.
		e := refuse("redirects from https to http")
		e.plain = true
		return e
	}
	for k := range req.Header {
		if !keptHeaders[k] {
			req.Header.Del(k)
		}
	}
	if req.Header.Get("Referer") != "" {
		// Storage services look from where one comes. What was asked for there, and
		// a signature in the URL, are not their business.
		req.Header.Set("Referer", r.scheme(last.URL)+"://"+last.URL.Host+"/")
	}
	if r.authorize != nil && !down {
		return r.authorize(req.Context(), req)
	}
	return nil
}

func (r redirects) scheme(u *url.URL) string {
	if r.plain(u.Host) {
		return "http"
	}
	return u.Scheme
}

func (r redirects) sameOrigin(a, b *url.URL) bool {
	return strings.EqualFold(a.Host, b.Host) && (a.Scheme == b.Scheme || r.scheme(a) == r.scheme(b))
}

func loopback(host string) bool {
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}
