package config

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/shoalfs/shoal/internal/pattern"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/wire"
)

// Store bounds what a supernode keeps.
type Store struct {
	Quota Size `toml:"quota" comment:"bytes on disk; if they are used up, the layers that were used longest ago are evicted"`
}

func (s Store) check(prefix string) error {
	// Room for one big layer's spool file and chunks, or nothing could be ingested.
	if s.Quota < 1<<30 {
		return fmt.Errorf("%sstore.quota is too small: it must be at least 1GiB", prefix)
	}
	return nil
}

// Bounds of what an operator may set: an ingest takes a processor, and a peer some tens
// of kilobytes of memory when it is there.
const (
	maxIngests = 256
	maxPeers   = 1 << 17
	// leastRate keeps a limit from being a failure: with less, one chunk takes longer
	// than those that wait for it have patience.
	leastRate = 1 << 20
)

// checkRate checks a limit in bytes a second, of which 0 means none.
func checkRate(key string, v Size) error {
	if v != 0 && v < leastRate {
		text, err := v.MarshalText()
		return errors.Join(err, fmt.Errorf("%s is %s: it must be at least 1MiB, or 0 for no limit", key, text))
	}
	return nil
}

// Registry says how registries are reached and how long their word counts.
type Registry struct {
	ConfigPath  string   `toml:"config_path" comment:"containerd's directory of hosts.toml files: mirrors, CAs, plain HTTP"`
	Allowed     []string `toml:"allowed" comment:"repositories that registries, and mirrors in hosts.toml, may be asked for, as patterns: \"registry.example.com/team/*\", \"docker.io/library/*\"; an asterisk stands for any characters. Nodes do not get images of other repositories, also if they are stored. A mirror needs an entry; a host that a registry redirects to does not"`
	Trusted     []string `toml:"trusted" comment:"registry hosts that only have to say (HEAD) that they have a layer that came from another registry; other hosts have to send such a layer again"`
	TagTTL      Duration `toml:"tag_ttl" comment:"how long the manifest that a tag names is cached before the registry is asked again"`
	AccessTTL   Duration `toml:"access_ttl" comment:"how long a registry's permission to pull is cached"`
	MaxDownload Size     `toml:"max_download" comment:"bytes a second of layers that are fetched from all registries together; 0: no limit"`
	Ingests     int      `toml:"ingests" comment:"how many layers of more than 8 MiB are fetched at the same time; a registry without a layer under way gets one more"`
	AccessGrace Duration `toml:"access_grace" comment:"how long a registry's permission counts while the registry is down (no answer or 5xx; not 429), for the same node with the same credential"`
}

// Repositories are those that Allowed names.
func (r Registry) Repositories() (*pattern.Repositories, error) {
	return pattern.ParseRepositories(r.Allowed)
}

func (r Registry) check(prefix string) error {
	if r.ConfigPath != "" && !filepath.IsAbs(r.ConfigPath) {
		return fmt.Errorf("%sregistry.config_path is %q: it must be an absolute path", prefix, r.ConfigPath)
	}
	for _, h := range r.Trusted {
		if h == "" || strings.ContainsAny(h, "/ ") {
			return fmt.Errorf("%sregistry.trusted names %q: it must be a host as in image references, such as \"registry.example.com:5000\"", prefix, h)
		}
	}
	if _, err := r.Repositories(); err != nil {
		return fmt.Errorf("%sregistry.allowed: %w", prefix, err)
	}
	if r.Ingests < 1 || r.Ingests > maxIngests {
		return fmt.Errorf("%sregistry.ingests is %d: it must be from 1 to %d; each takes a processor and a connection", prefix, r.Ingests, maxIngests)
	}
	if err := checkRate(prefix+"registry.max_download", r.MaxDownload); err != nil {
		return err
	}
	if r.AccessGrace < r.AccessTTL {
		return fmt.Errorf("%sregistry.access_grace (%v) is shorter than %sregistry.access_ttl (%v): a registry's permission would count for less time while the registry is down than while it is up",
			prefix, time.Duration(r.AccessGrace), prefix, time.Duration(r.AccessTTL))
	}
	return errors.Join(
		atLeast(prefix+"registry.tag_ttl", r.TagTTL, Duration(time.Second)),
		atLeast(prefix+"registry.access_ttl", r.AccessTTL, Duration(time.Second)))
}

// Supernode is the file of `shoal supernode`.
type Supernode struct {
	Version        int      `toml:"version"`
	Root           string   `toml:"root" comment:"directory of identity, chunks and indexes"`
	Listen         []string `toml:"listen" comment:"host:port addresses for nodes; without a host: all addresses of this machine, IPv4 and IPv6"`
	TokenFile      string   `toml:"token_file" comment:"file of the file of the tokens that nodes join with, one a line; empty: the file token in root, which is made at the first start"`
	Siblings       []string `toml:"siblings" comment:"the supernodes of this datacenter, ID@host:port, if there are several; the same list on each; a supernode's own address may be in it"`
	MaxUpload      Size     `toml:"max_upload" comment:"bytes a second of chunks that this supernode sends; all nodes share them, and demand reads come before prefetch; 0: no limit"`
	MaxPeers       int      `toml:"max_peers" comment:"how many nodes and supernodes may be connected at a time"`
	ControlAddress string   `toml:"control_address" comment:"Unix socket for shoal status, prefetch, members and check"`
	MetricsAddress string   `toml:"metrics_address" comment:"host:port for Prometheus (/metrics), /healthz and /readyz; empty: off"`
	Store          Store    `toml:"store"`
	Registry       Registry `toml:"registry"`
	Log            Log      `toml:"log"`
}

// DefaultSupernode returns the defaults.
func DefaultSupernode() *Supernode {
	return &Supernode{
		Version:        Version,
		Root:           "/var/lib/shoal-supernode",
		Listen:         []string{":7700"},
		Siblings:       []string{},
		MaxPeers:       12_000,
		ControlAddress: "/run/shoal/supernode.sock",
		MetricsAddress: "127.0.0.1:7701",
		Store:          defaultStore(),
		Registry:       defaultRegistry(),
		Log:            Log{Format: "text"},
	}
}

func defaultStore() Store { return Store{Quota: 100 << 30} }

func defaultRegistry() Registry {
	return Registry{
		ConfigPath:  "/etc/containerd/certs.d",
		Allowed:     []string{"*"},
		Trusted:     []string{},
		Ingests:     4,
		TagTTL:      Duration(time.Minute),
		AccessTTL:   Duration(5 * time.Minute),
		AccessGrace: Duration(24 * time.Hour),
	}
}

// Check returns what is wrong with the values, each error naming its key.
func (c *Supernode) Check() error {
	errs := []error{
		checkVersion(c.Version),
		checkAbs("root", c.Root), checkSocket("control_address", c.ControlAddress),
		c.Store.check(""), c.Registry.check(""), c.Log.check(),
	}
	if len(c.Listen) == 0 {
		errs = append(errs, errors.New("listen is empty: no node could reach this supernode"))
	}
	if c.MaxPeers < 1 || c.MaxPeers > maxPeers {
		errs = append(errs, fmt.Errorf("max_peers is %d: it must be from 1 to %d", c.MaxPeers, maxPeers))
	}
	errs = append(errs, checkRate("max_upload", c.MaxUpload))
	if c.TokenFile != "" {
		errs = append(errs, checkAbs("token_file", c.TokenFile))
	}
	errs = append(errs, checkSupernodes("siblings", c.Siblings))
	for _, a := range c.Listen {
		errs = append(errs, checkHostPort("listen", a))
	}
	if c.MetricsAddress != "" {
		errs = append(errs, checkHostPort("metrics_address", c.MetricsAddress))
	}
	return errors.Join(errs...)
}

// checkSupernodes checks a list of addresses, each with another ID.
func checkSupernodes(key string, list []string) error {
	var errs []error
	seen := map[string]bool{}
	for _, s := range list {
		info, err := host.ParseAddr(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
			continue
		}
		if id := info.ID.String(); seen[id] {
			errs = append(errs, fmt.Errorf("%s names %s twice: give one address for each supernode; a host name may stand for several addresses", key, id))
		} else {
			seen[id] = true
		}
	}
	return errors.Join(errs...)
}

func checkLabel(key, label string) error {
	if err := wire.CheckLabel(key, label); err != nil {
		return fmt.Errorf("%s is %q: %w", key, label, err)
	}
	return nil
}

func checkAbs(key, path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%s is %q: it must be an absolute path", key, path)
	}
	return nil
}

// maxSocket is how long the path of a Unix socket may be (unix(7), sun_path).
const maxSocket = 107

func checkSocket(key, path string) error {
	if len(path) > maxSocket {
		return fmt.Errorf("%s is %q: that is %d bytes, and Linux allows %d for a socket", key, path, len(path), maxSocket)
	}
	return checkAbs(key, path)
}

func checkHostPort(key, addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%s: %q is not host:port", key, addr)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%s: %q has no port from 0 to 65535", key, addr)
	}
	return nil
}
