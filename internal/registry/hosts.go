package registry

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
)

// hostSet is what hosts.toml says about a registry: mirrors first, the registry
// itself last.
type hostSet struct {
	hosts []docker.RegistryHost
	pools []*http.Transport // their connections
	until time.Time
	heads chan struct{} // a send is a question for a blob

	mu    sync.Mutex
	loops map[string]bool // hosts that turned out to be a node's mirror
	plain map[string]bool // hosts that have answered without TLS
}

func (h *hostSet) setPlain(host string) {
	if !slices.ContainsFunc(h.hosts, func(r docker.RegistryHost) bool { return r.Host == host }) {
		return // the target of a redirect: its URL says what it is
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.plain == nil {
		h.plain = map[string]bool{}
	}
	h.plain[host] = true
}

func (h *hostSet) isPlain(host string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.plain[host]
}

// loop notes a host that would ask the supernode what the supernode asks it: a
// node's mirror, which is in the hosts.toml that containerd shares with it. What
// comes last is the registry itself.
func (h *hostSet) loop(host string) {
	last := len(h.hosts) - 1
	if !slices.ContainsFunc(h.hosts[:last], func(r docker.RegistryHost) bool { return r.Host == host }) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.loops == nil {
		h.loops = map[string]bool{}
	}
	h.loops[host] = true
}

func (h *hostSet) looping() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.loops)
}

// usable are the hosts that do not lead back here, and how many names do.
func (h *hostSet) usable() ([]docker.RegistryHost, int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	last := len(h.hosts) - 1
	hosts := slices.DeleteFunc(slices.Clone(h.hosts[:last]), func(r docker.RegistryHost) bool { return h.loops[r.Host] })
	return append(hosts, h.hosts[last]), len(h.loops)
}

func (h *hostSet) closeIdle() {
	for _, tr := range h.pools {
		tr.CloseIdleConnections()
	}
}

// hostDir finds a registry's hosts.toml directory as containerd does, by its name
// in lower case or as somebody has spelled it.
func (c *Client) hostDir(host string) (string, error) {
	for _, d := range c.cfg.HostDirs {
		if dir, ok := foldedDir(d, host); ok {
			return dir, nil
		}
		dir, err := config.HostDirFromRoot(d)(host)
		if err == nil || !errdefs.IsNotFound(err) {
			return dir, err
		}
	}
	return "", errdefs.ErrNotFound
}

// foldedDir finds a directory whose name is the host but for upper case: "Host",
// "Host:5000" or "Host_5000_".
func foldedDir(root, host string) (string, bool) {
	entries, err := os.ReadDir(root)
	if err != nil {
		return "", false // what is wrong with it, containerd's function finds out
	}
	other := host
	if i := strings.LastIndex(host, ":"); i > 0 {
		other = host[:i] + "_" + host[i+1:] + "_"
	}
	found := ""
	for _, e := range entries {
		switch n := e.Name(); {
		case n == host, n == other:
			return "", false
		case strings.EqualFold(n, host), strings.EqualFold(n, other):
			found = filepath.Join(root, n)
		}
	}
	return found, found != ""
}
