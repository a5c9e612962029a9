package registry

import (
	"context"

	"github.com/containerd/containerd/v2/core/remotes/docker"

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
		err := s.head(ctx, ref, "blobs", l.Digest)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if e := mapError(ctx, "", err); Outage(e) || Limited(e) || Downgraded(e) || l.Size == 0 {
			return err
		}
		return s.each(ctx, docker.HostCapabilityPull|docker.HostCapabilityResolve, func(ctx context.Context, h docker.RegistryHost) error {
			b, err := open(ctx, h, ref, l, 0)
			if err != nil {
				return err
			}
			return b.rc.Close()
		})
	})
}
