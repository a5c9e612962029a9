package registry

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
)

// each asks the hosts that have the capabilities, in the order of hosts.toml, until one
// gives what is asked for. If none does, then the error is the last host's, which is the
// registry itself: a mirror gets no credential, so a refusal there says nothing about
// the credential, and a mirror that is down or has no copy says nothing about the
// registry. Containerd's resolver would return the error of one of them.
//
// If ctx has a deadline, then each host but the last has half of the time that is left.
func (s *session) each(ctx context.Context, caps docker.HostCapabilities, ask func(context.Context, docker.RegistryHost) error) error {
	hosts := s.having(caps)
	if len(hosts) == 0 {
		what := "pull"
		if caps.Has(docker.HostCapabilityResolve) {
			what = "resolve"
		}
		return &Error{Host: s.hosts[len(s.hosts)-1].Host, answered: true, kind: blockdev.ErrUnavailable, text: fmt.Sprintf("its hosts.toml names no host with the capability %q", what)}
	}
	var before []string
	for i, h := range hosts {
		hctx, cancel := context.WithCancel(ctx)
		last := i == len(hosts)-1
		if deadline, ok := ctx.Deadline(); ok && !last {
			cancel()
			hctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/2)
		}
		err := ask(hctx, h)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
		err = tried{error: err, host: h.Host, before: strings.Join(before, "; ")}
		if last {
			return err
		}
		before = append(before, mapError(ctx, "", err).Error())
	}
	return nil // there are hosts
}

// tried is the error of a host, with what those before it said.
type tried struct {
	error
	host, before string
}

// Unwrap returns the host's error.
func (t tried) Unwrap() error { return t.error }

// resolver returns containerd's resolver for one host.
func resolver(h docker.RegistryHost) remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{Hosts: func(string) ([]docker.RegistryHost, error) { return []docker.RegistryHost{h}, nil }})
}

// head asks each host with the capability "resolve" whether it has a manifest or
// a blob.
func (s *session) head(ctx context.Context, ref Reference, kind string, d blockdev.Digest) error {
	spec, err := reference.Parse(ref.withDigest(d))
	if err != nil {
		return fmt.Errorf("%s: %w", ref.Name(), err)
	}
	if ctx, err = docker.ContextWithRepositoryScope(ctx, spec, false); err != nil {
		return fmt.Errorf("%s: %w", ref.Name(), err)
	}
	return s.each(ctx, docker.HostCapabilityPull|docker.HostCapabilityResolve, func(ctx context.Context, h docker.RegistryHost) error {
		return headAt(ctx, h, ref, kind, d)
	})
}

// maxChallenges bounds how often a host may ask for another credential.
const maxChallenges = 3

func headAt(ctx context.Context, h docker.RegistryHost, ref Reference, kind string, d blockdev.Digest) error {
	u := url.URL{Scheme: h.Scheme, Host: h.Host, Path: path.Join("/", h.Path, ref.Repository, kind, d.String())}
	if h.Host != ref.Host && (ref.Host != "docker.io" || h.Host != "registry-1.docker.io") {
		u.RawQuery = url.Values{"ns": {ref.Host}}.Encode() // as containerd does for mirrors
	}
	method := http.MethodHead
	var answers []*http.Response
	for {
		req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
		if err != nil {
			return fmt.Errorf("registry %s: %w", h.Host, err)
		}
		req.Header.Set("User-Agent", "containerd/"+version.Version)
		req.Header.Set("Accept", "*/*")
		for k, v := range h.Header {
			req.Header[k] = v
		}
		if err := h.Authorizer.Authorize(ctx, req); err != nil {
			return fmt.Errorf("registry %s: %w", h.Host, err)
		}
		resp, err := h.Client.Do(req)
		if err != nil {
			return fmt.Errorf("registry %s: %w", h.Host, err)
		}
		_ = resp.Body.Close()           // the status says it
		answers = append(answers, resp) //nolint:bodyclose // it is closed above
		refused := &Error{Host: req.URL.Host, Status: resp.StatusCode, kind: kindOf(resp.StatusCode)}
		switch {
		case resp.StatusCode < 300:
			return nil
		case resp.StatusCode == http.StatusUnauthorized && len(answers) <= maxChallenges:
			switch err := h.Authorizer.AddResponses(ctx, answers); {
			case errdefs.IsNotImplemented(err): // no challenge that one could answer
				return refused
			case err != nil:
				return fmt.Errorf("registry %s: %w", h.Host, err)
			}
		case resp.StatusCode == http.StatusMethodNotAllowed && method == http.MethodHead && kind == "manifests":
			method = http.MethodGet // as containerd does
		default:
			return refused
		}
	}
}
