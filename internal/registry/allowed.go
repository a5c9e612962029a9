package registry

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/pattern"
)

// ErrNotAllowed says that this supernode may not ask for a repository. It wraps
// blockdev.ErrUnauthorized.
var ErrNotAllowed error = notAllowed{}

type notAllowed struct{}

func (notAllowed) Error() string {
	return "the supernode's config does not name this repository (registry.allowed)"
}
func (notAllowed) Unwrap() error { return blockdev.ErrUnauthorized }

// Answered says that it is no supernode that is not there.
func (notAllowed) Answered() bool { return true }

// Allow sets what may be asked for from now on; nil: everything. Requests that are
// under way go on.
func (c *Client) Allow(list *pattern.Repositories) { c.allowed.Store(list) }

// Limit changes the rate of Config.Download, if there is one.
func (c *Client) Limit(rate int64) { c.cfg.Download.Set(rate) }

// Allowed returns an error that wraps ErrNotAllowed if no registry may be asked for the
// repository.
func (c *Client) Allowed(ref Reference) error {
	if c.allowed.Load().Has(ref.Name()) {
		return nil
	}
	return fmt.Errorf("%s: %w", ref.Name(), ErrNotAllowed)
}

// NotAllowed says of an error whether it is one of Allowed.
func NotAllowed(err error) bool { return errors.Is(err, ErrNotAllowed) }

// permitted leaves out the hosts of a session that may not be asked for a repository:
// mirrors that registry.allowed does not name. Where the registry or a mirror
// redirects to is its own word, and not looked at.
func (c *Client) permitted(s *session, ref Reference) (*session, error) {
	list := c.allowed.Load()
	if !list.Has(ref.Name()) {
		return nil, c.Allowed(ref)
	}
	may := func(h docker.RegistryHost) bool { return ownHost(h, ref) || list.Has(mirrorName(h, ref)) }
	if !slices.ContainsFunc(s.hosts, func(h docker.RegistryHost) bool { return !may(h) }) {
		return s, nil
	}
	part := *s
	part.hosts = nil
	for _, h := range s.hosts {
		if may(h) {
			part.hosts = append(part.hosts, h)
			continue
		}
		if c.firstTime(h.Host) {
			c.log.Warn("a host of hosts.toml is not asked: registry.allowed does not name it", "registry", ref.Host, "host", h.Host, "as", mirrorName(h, ref))
		}
	}
	if len(part.hosts) == 0 {
		return nil, fmt.Errorf("%s: hosts.toml sends requests to hosts that may not be asked: %w", ref.Name(), ErrNotAllowed)
	}
	return &part, nil
}

// ownHost says whether a host is the registry that the reference names.
func ownHost(h docker.RegistryHost, ref Reference) bool {
	own, err := docker.DefaultHost(ref.Host)
	return strings.EqualFold(h.Host, ref.Host) || err == nil && strings.EqualFold(h.Host, own)
}

// mirrorName is what a repository is called at a mirror, with the path that hosts.toml
// may put in front.
func mirrorName(h docker.RegistryHost, ref Reference) string {
	prefix := strings.TrimPrefix(path.Join("/", h.Path), "/v2")
	return strings.ToLower(h.Host) + path.Join("/", prefix, ref.Repository)
}

// firstTime says whether to log something about a host.
func (c *Client) firstTime(host string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	known := c.told.Contains(host)
	c.told.Add(host, struct{}{})
	return !known
}
