package registry

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"path"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/version"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// maxHeads bounds the questions for blobs that are under way at one registry.
const maxHeads = 16

// HasBlob asks the registry whether m's repository has a layer and the credential
// may have it; nil means yes. Like Check it is never answered from a cache, and
// only hosts with the capability "resolve" are asked. Errors are those of the
// package, without m's reference.
//
// The registry's word has to come over TLS where it speaks TLS; see Downgraded.
//
// It sends a HEAD. Where that is refused, or leads to a URL that is signed for GET,
// it begins to GET the layer: that is what everybody does.
func (c *Client) HasBlob(ctx context.Context, m *Manifest, l Layer, cred image.Credential) error {
	ref := Reference{Host: m.Host, Repository: m.Repository, Digest: m.Digest}
	return c.do(ctx, ref, "", cred, func(ctx context.Context, s *session) error {
		select {
		case s.set.heads <- struct{}{}:
			defer func() { <-s.set.heads }()
		case <-ctx.Done():
			return ctx.Err()
		}
		ctx = context.WithValue(ctx, onlyTLS{}, true)
		speaks := *s
		speaks.hosts = s.having(docker.HostCapabilityPull | docker.HostCapabilityResolve)
		err := speaks.headBlob(ctx, ref, l.Digest)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if e := mapError(ctx, "", err); Outage(e) || Limited(e) || Downgraded(e) || l.Size == 0 {
			return err
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		b, err := open(ctx, &speaks, ref, l, 0)
		if err != nil {
			return err
		}
		return b.rc.Close()
	})
}

// headBlob asks the hosts in turn. The error is that of the last, the registry.
func (s *session) headBlob(ctx context.Context, ref Reference, d blockdev.Digest) error {
	spec, err := reference.Parse(ref.withDigest(d))
	if err != nil {
		return fmt.Errorf("%s: %w", ref.Name(), err)
	}
	if ctx, err = docker.ContextWithRepositoryScope(ctx, spec, false); err != nil {
		return fmt.Errorf("%s: %w", ref.Name(), err)
	}
	err = &Error{Host: ref.Host, answered: true, kind: blockdev.ErrUnavailable, text: `its hosts.toml names no host with the capability "resolve"`}
	for _, h := range s.hosts {
		if err = headAt(ctx, h, ref, d); err == nil {
			break
		}
	}
	return err
}

// maxChallenges bounds how often a host may ask for another credential.
const maxChallenges = 3

func headAt(ctx context.Context, h docker.RegistryHost, ref Reference, d blockdev.Digest) error {
	u := url.URL{Scheme: h.Scheme, Host: h.Host, Path: path.Join("/", h.Path, ref.Repository, "blobs", d.String())}
	if h.Host != ref.Host && (ref.Host != "docker.io" || h.Host != "registry-1.docker.io") {
		u.RawQuery = url.Values{"ns": {ref.Host}}.Encode() // as containerd does for mirrors
	}
	var answers []*http.Response
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodHead, u.String(), nil)
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
		_ = resp.Body.Close() // there is none
		if resp.StatusCode < 300 {
			return nil
		}
		answers = append(answers, resp) //nolint:bodyclose // it is closed above
		if resp.StatusCode == http.StatusUnauthorized && len(answers) <= maxChallenges && h.Authorizer.AddResponses(ctx, answers) == nil {
			continue
		}
		return &Error{Host: req.URL.Host, Status: resp.StatusCode, kind: kindOf(resp.StatusCode)}
	}
}
