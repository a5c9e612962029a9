package registry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
)

// Error is why a request to a registry failed. It wraps one of the blockdev
// errors.
type Error struct {
	// Ref is what was asked for, as far as it is known.
	Ref string
	// Host answered, or did not. It may be a mirror or the target of a redirect.
	Host string
	// Status is the HTTP status; 0 if there was no answer.
	Status int
	// Code is the registry's own word for it ("TOOMANYREQUESTS"), or empty.
	Code string

	after time.Duration
	kind  error
	text  string
	// answered: it was there, and what it said is of no use. Follows from Status
	// where that is set.
	answered bool
	plain    bool   // it is about a redirect away from TLS
	before   string // what the hosts said that were asked before
}

// Downgraded says of an error of this package whether an answer was refused
// because the registry sends requests from TLS to plain HTTP.
func Downgraded(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.plain
}

// Outage says of an error of this package whether the registry is down: there was
// no answer, or one that speaks of a fault of its own. A rate limit, a refusal and
// an answer that cannot be used are none.
func Outage(err error) bool {
	if !errors.Is(err, blockdev.ErrUnavailable) {
		return false
	}
	var e *Error
	return !errors.As(err, &e) || !e.answered && (e.Status == 0 || e.Status >= 500 || e.Status == http.StatusRequestTimeout)
}

// Limited says of an error of this package whether the registry refuses to be
// asked so often, perhaps only by those without a credential.
func Limited(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusTooManyRequests
}

// RetryAfter is how long the registry wants to be left alone; 0 if it did not say.
func (e *Error) RetryAfter() time.Duration { return e.after }

// Answered says that it is about a registry, and not about a supernode that is not
// there.
func (e *Error) Answered() bool { return true }

// Unwrap returns the blockdev error.
func (e *Error) Unwrap() error { return e.kind }

func (e *Error) Error() string {
	var b strings.Builder
	if e.Ref != "" {
		b.WriteString(e.Ref + ": ")
	}
	if e.Host != "" {
		b.WriteString("registry " + e.Host + ": ")
	}
	if e.Status != 0 {
		fmt.Fprintf(&b, "HTTP %d %s: ", e.Status, http.StatusText(e.Status))
	}
	if e.Code != "" {
		b.WriteString(e.Code + ": ")
	}
	if e.text != "" {
		b.WriteString(e.text + ": ")
	}
	if e.after > 0 {
		fmt.Fprintf(&b, "asks to wait %s: ", e.after)
	}
	b.WriteString(e.kind.Error())
	if e.before != "" {
		b.WriteString(" (asked before: " + e.before + ")")
	}
	return b.String()
}

// tunnel is http.Transport.OnProxyConnectResponse: net/http's own error is the status' text,
// which reads as if it were the registry's.
func tunnel(_ context.Context, proxy *url.URL, req *http.Request, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return &Error{kind: blockdev.ErrUnavailable,
		text: fmt.Sprintf("the proxy %s makes no tunnel to %s: HTTP %d %s", proxy.Host, req.Host, resp.StatusCode, http.StatusText(resp.StatusCode))}
}

// kindOf says what a status means to shoal.
func kindOf(status int) error {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden:
		return blockdev.ErrUnauthorized
	case http.StatusNotFound, http.StatusGone:
		return blockdev.ErrNotFound
	case http.StatusRequestedRangeNotSatisfiable:
		// The blob is shorter than its descriptor says.
		return blockdev.ErrCorrupt
	default:
		return blockdev.ErrUnavailable
	}
}

const maxRetryAfter = time.Hour

// retryAfter reads the header's two forms, seconds and a date (RFC 9110, 10.2.3).
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := strings.TrimSpace(h.Get("Retry-After"))
	if v == "" {
		return 0
	}
	var d time.Duration
	if s, err := strconv.ParseInt(v, 10, 32); err == nil {
		d = time.Duration(s) * time.Second
	} else if t, err := http.ParseTime(v); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), maxRetryAfter)
}

// mapError turns what containerd's resolver returns into an *Error, or into an
// error that wraps the context's. Texts of the causes are used only where they
// cannot hold secrets.
func mapError(ctx context.Context, ref string, err error) error {
	if err == nil {
		return nil
	}
	if cerr := ctx.Err(); cerr != nil {
		if cause := context.Cause(ctx); errors.Is(cause, errSlow) {
			return &Error{Ref: ref, kind: blockdev.ErrUnavailable, text: cause.Error()}
		}
		if ref == "" {
			return fmt.Errorf("asking the registry: %w", cerr)
		}
		return fmt.Errorf("%s: asking the registry: %w", ref, cerr)
	}
	if NotAllowed(err) {
		if ref == "" {
			return err
		}
		return fmt.Errorf("%s: %w", ref, err)
	}
	e := facts(err)
	if e.Ref == "" {
		e.Ref = ref
	}
	var t tried
	if errors.As(err, &t) {
		e.before = t.before
		if e.Host == "" {
			e.Host = t.host
		}
	}
	return e
}

// facts are what is known of an error of a request.
func facts(err error) *Error {
	var own *Error
	if errors.As(err, &own) {
		e := *own
		return &e
	}
	e := &Error{kind: blockdev.ErrUnavailable}
	var status remoteerrors.ErrUnexpectedStatus
	var ue *url.Error
	switch {
	case errors.As(err, &status):
		e.Status, e.kind = status.StatusCode, kindOf(status.StatusCode)
		e.Code = errorCode(status.Body)
		if u, perr := url.Parse(status.RequestURL); perr == nil {
			e.Host = u.Host
		}
	case errors.Is(err, docker.ErrInvalidAuthorization):
		e.kind, e.text = blockdev.ErrUnauthorized, "the credential is missing or refused"
	case strings.Contains(err.Error(), "byte manifest for"):
		// containerd's refusal of a manifest beyond its MaxManifestSize, which it
		// calls "not found".
		e.kind, e.text = blockdev.ErrUnsupported, "the manifest is larger than a manifest may be"
	case errdefs.IsNotImplemented(err):
		e.kind, e.text = blockdev.ErrUnsupported, "containerd's resolver does not support what the registry answers: "+scrub(err.Error())
	case errdefs.IsNotFound(err):
		e.kind, e.text = blockdev.ErrNotFound, "the registry does not have it"
	case errors.Is(err, auth.ErrNoToken):
		e.answered, e.text = true, "its token server answered without a token"
	case errors.As(err, &ue):
		if u, perr := url.Parse(ue.URL); perr == nil {
			e.Host = u.Host
		}
		e.text = netText(ue)
	default:
		e.text = scrub(err.Error())
	}
	return e
}

func netText(ue *url.Error) string {
	var dns *net.DNSError
	switch {
	case errors.Is(ue.Err, errStalled):
		return errStalled.Error()
	case errors.As(ue.Err, &dns):
		return "cannot find its address: " + dns.Err
	case ue.Timeout():
		return "no answer in time"
	}
	return scrub(ue.Err.Error())
}

var (
	queryRE = regexp.MustCompile(`\?[^\s"'<>]*`)
	userRE  = regexp.MustCompile(`//[^/\s"']*@`)
	codeRE  = regexp.MustCompile(`"code"\s*:\s*"([A-Z][A-Z_]{1,39})"`)
)

// scrub takes out of an error text what may be secret (queries and user parts
// of URLs) and what is unreadable, and bounds it.
func scrub(s string) string {
	s = queryRE.ReplaceAllString(s, "?...")
	s = userRE.ReplaceAllString(s, "//...@")
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r > 0xffff {
			return ' '
		}
		return r
	}, s)
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "") + "..."
	}
	return s
}

// errorCode picks the error code out of a registry's error body. The message
// beside it is left alone: it is free text and may repeat what was sent.
func errorCode(body []byte) string {
	if m := codeRE.FindSubmatch(body[:min(len(body), maxErrorBody)]); m != nil {
		return string(m[1])
	}
	return ""
}
