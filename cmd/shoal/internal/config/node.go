package config

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"time"

	"github.com/shoalfs/shoal/p2p/wire"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

// Embedded configures the supernode inside a node that names no other.
type Embedded struct {
	Store    Store    `toml:"store"`
	Registry Registry `toml:"registry"`
}

// Images are rules for images, by patterns of their names.
type Images struct {
	Lazy     []string               `toml:"lazy" comment:"images that may be lazy"`
	Never    []string               `toml:"never" comment:"images that containerd unpacks, also if lazy names them"`
	Eager    []string               `toml:"eager" comment:"images whose pull ends only when every byte is here and proven"`
	Prefetch map[string]policy.Mode `toml:"prefetch" comment:"pattern = \"all\", \"startup\" or \"none\", instead of the key prefetch; if several patterns match, the one with the longest name counts"`
}

// Node is the file of `shoal node`.
type Node struct {
	Version                 int         `toml:"version"`
	Root                    string      `toml:"root" comment:"directory of indexes, local diffs and mounts; a short path leaves room for images with many layers"`
	Address                 string      `toml:"address" comment:"Unix socket for containerd: [proxy_plugins.shoal] address"`
	ControlAddress          string      `toml:"control_address" comment:"Unix socket for shoal status, prefetch and check"`
	MetricsAddress          string      `toml:"metrics_address" comment:"host:port for Prometheus (/metrics), /healthz and /readyz; empty: off"`
	MirrorAddress           string      `toml:"mirror_address" comment:"host:port of the registry mirror that containerd's hosts.toml names; keep it on loopback; empty: off"`
	MirrorPlainHTTP         bool        `toml:"mirror_plain_http" comment:"true: the mirror speaks HTTP, not TLS. If another process takes the mirror's port while shoal does not run, that process gets the credentials of every pull"`
	Supernodes              []string    `toml:"supernodes" comment:"addresses of the supernodes, ID@host:port as shoal supernode prints them; empty: this node embeds a supernode"`
	TokenFile               string      `toml:"token_file" comment:"file with the token that this node joins the supernodes with: a copy of a token in the supernode's token_file"`
	Listen                  []string    `toml:"listen" comment:"host:port addresses for other nodes; without a host: all addresses of this machine, IPv4 and IPv6; empty: this node shares nothing"`
	Announce                []string    `toml:"announce" comment:"IP:port addresses at which other nodes dial this node, such as that of a NAT; empty: the addresses of the network interface over which this node reaches the supernode"`
	Zone                    string      `toml:"zone" comment:"the zone of this node; nodes keep traffic between zones low; may be empty"`
	Rack                    string      `toml:"rack" comment:"the rack in the zone; may be empty"`
	MaxUpload               Size        `toml:"max_upload" comment:"bytes a second that this node sends to other nodes; 0: no limit"`
	MaxDownload             Size        `toml:"max_download" comment:"bytes a second of chunks that this node takes from other nodes and supernodes; 0: no limit"`
	DockerConfig            string      `toml:"docker_config" comment:"directory of docker's config.json with registry credentials, for shoal prefetch; empty: $DOCKER_CONFIG or ~/.docker"`
	NodeCredentialsForPulls bool        `toml:"node_credentials_for_pulls" comment:"true: EVERY container of this machine may run EVERY image that the credentials in docker_config open, without a pull secret of its own. false: a private image is lazy for pulls that show their own credential, through the mirror"`
	IndexTimeout            Duration    `toml:"index_timeout" comment:"how long the node waits for an image's indexes; if they come after prepare_timeout, then they are kept for the next pull"`
	PrepareTimeout          Duration    `toml:"prepare_timeout" comment:"how long a call of containerd waits for an image's indexes; after that, containerd unpacks the image. containerd's garbage collection, and with it all pods of the node, wait for such a call: a longer time gives more lazy pulls, and longer stalls"`
	ReadTimeout             Duration    `toml:"read_timeout" comment:"how long a container's read may wait for bytes before it fails"`
	CacheQuota              Size        `toml:"cache_quota" comment:"bytes on disk for layers; 0: the whole disk. Layers that no container and no image uses are evicted; bytes that do not fit are read and not stored"`
	Prefetch                policy.Mode `toml:"prefetch" comment:"which chunks of a lazy image are prefetched: all of them (all), those that containers read at their start (startup), or none of them (none)"`
	PrefetchAfterPull       bool        `toml:"prefetch_after_pull" comment:"true: if no container has started after the pull of an image, the image is prefetched, too, as prefetch says"`
	PrefetchAfterExit       bool        `toml:"prefetch_after_exit" comment:"true: prefetch of an image goes on after its last container has ended"`
	PrefetchRate            Size        `toml:"prefetch_rate" comment:"bytes a second, uncompressed, of prefetch; demand reads, startup chunks, and pulls that wait for all bytes are not limited; 0: no limit"`
	Mount                   string      `toml:"mount" comment:"how layers are mounted: file (from their files, Linux 6.12) or loop (through loop devices, which is slower: for programs that open files of images with O_DIRECT; docs/limits.md has the figures)"`
	ScrubInterval           Duration    `toml:"scrub_interval" comment:"how often everything on this disk is read and checked, at 32 MiB/s at most; 0s: never"`
	RegistryConfigPath      string      `toml:"registry_config_path" comment:"containerd's directory of hosts.toml files, for layers that no supernode has and this node reads from the registry itself"`
	Images                  Images      `toml:"images" comment:"rules for images by their names. An asterisk stands for any characters: \"registry.example.com/base/*\", \"docker.io/library/redis:7*\"; without a tag a pattern fits every tag"`
	Embedded                Embedded    `toml:"embedded" comment:"the supernode inside a node whose supernodes is empty"`
	Log                     Log         `toml:"log"`
}

// minCacheQuota leaves room for the indexes and metadata of some images.
const minCacheQuota = 64 << 20

// Values of Node.Mount.
const (
	MountFile = "file"
	MountLoop = "loop"
)

// DefaultNode returns the defaults.
func DefaultNode() *Node {
	return &Node{
		Version:            Version,
		Root:               "/var/lib/shoal",
		Address:            "/run/shoal/shoal.sock",
		ControlAddress:     "/run/shoal/control.sock",
		MetricsAddress:     "127.0.0.1:7702",
		MirrorAddress:      "127.0.0.1:7704",
		Supernodes:         []string{},
		TokenFile:          "/etc/shoal/token",
		Listen:             []string{":7703"},
		Announce:           []string{},
		IndexTimeout:       Duration(5 * time.Minute),
		PrepareTimeout:     Duration(3 * time.Second),
		ReadTimeout:        Duration(time.Minute),
		Prefetch:           policy.All,
		PrefetchAfterPull:  true,
		PrefetchRate:       64 << 20,
		Mount:              MountFile,
		ScrubInterval:      Duration(7 * 24 * time.Hour),
		RegistryConfigPath: defaultRegistry().ConfigPath,
		Images:             Images{Lazy: []string{"*"}, Never: []string{}, Eager: []string{}, Prefetch: map[string]policy.Mode{}},
		Embedded:           Embedded{Store: defaultStore(), Registry: defaultRegistry()},
		Log:                Log{Format: "text"},
	}
}

// Policy is what the config says of images.
func (c *Node) Policy() (*policy.Policy, error) {
	return policy.New(policy.Rules{
		Lazy: c.Images.Lazy, Never: c.Images.Never, Eager: c.Images.Eager,
		Prefetch: c.Images.Prefetch, Default: c.Prefetch,
	})
}

// Announced reads announce.
func (c *Node) Announced() ([]netip.AddrPort, error) {
	if len(c.Announce) > 0 && len(c.Listen) == 0 {
		return nil, errors.New("announce is set and listen is empty: a node that shares nothing has no address to announce")
	}
	if len(c.Announce) > wire.MaxAddrs {
		return nil, fmt.Errorf("announce has %d addresses: at most %d are allowed", len(c.Announce), wire.MaxAddrs)
	}
	var out []netip.AddrPort
	for _, a := range c.Announce {
		ap, err := netip.ParseAddrPort(a)
		switch ip := ap.Addr(); {
		case err != nil:
			return nil, fmt.Errorf("announce: %q is not IP:port, such as \"192.0.2.7:7703\" or \"[2001:db8::7]:7703\"", a)
		case ap.Port() == 0 || ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast() || ip.Zone() != "":
			return nil, fmt.Errorf("announce: no other machine can dial %q", a)
		}
		out = append(out, ap)
	}
	return out, nil
}

// Check returns what is wrong with the values, each error naming its key.
func (c *Node) Check() error {
	errs := []error{
		checkVersion(c.Version),
		checkAbs("root", c.Root), checkSocket("address", c.Address), checkSocket("control_address", c.ControlAddress),
		c.Embedded.Store.check("embedded."), c.Embedded.Registry.check("embedded."), c.Log.check(),
		atLeast("index_timeout", c.IndexTimeout, Duration(time.Second)),
		atLeast("prepare_timeout", c.PrepareTimeout, Duration(100*time.Millisecond)),
		atLeast("read_timeout", c.ReadTimeout, Duration(time.Second)),
	}
	_, err := c.Policy()
	errs = append(errs, err)
	if q := int64(c.CacheQuota); q > 0 && q < minCacheQuota {
		errs = append(errs, fmt.Errorf("cache_quota is %d bytes: it must be at least 64MiB, or 0 for the whole disk", q))
	}
	if c.Mount != MountFile && c.Mount != MountLoop {
		errs = append(errs, fmt.Errorf("mount is %q: it must be \"file\" or \"loop\"", c.Mount))
	}
	if c.RegistryConfigPath != "" {
		errs = append(errs, checkAbs("registry_config_path", c.RegistryConfigPath))
	}
	if c.ScrubInterval != 0 {
		errs = append(errs, atLeast("scrub_interval", c.ScrubInterval, Duration(time.Hour)))
	}
	if c.Address == c.ControlAddress {
		errs = append(errs, fmt.Errorf("address and control_address are both %q: containerd and the shoal command need a socket each", c.Address))
	}
	if c.MetricsAddress != "" {
		errs = append(errs, checkHostPort("metrics_address", c.MetricsAddress))
	}
	if c.MirrorAddress != "" {
		errs = append(errs, checkHostPort("mirror_address", c.MirrorAddress))
		if c.MirrorAddress == c.MetricsAddress {
			errs = append(errs, fmt.Errorf("mirror_address and metrics_address are both %q: each needs a port of its own", c.MirrorAddress))
		}
	}
	if c.DockerConfig != "" {
		errs = append(errs, checkAbs("docker_config", c.DockerConfig))
	}
	if len(c.Supernodes) > 0 && !reflect.DeepEqual(c.Embedded, DefaultNode().Embedded) {
		errs = append(errs, errors.New("supernodes and embedded are both set: a node that names supernodes does not embed one, so set store and registry in the supernode's own file"))
	}
	for _, a := range c.Listen {
		errs = append(errs, checkHostPort("listen", a))
	}
	_, err = c.Announced()
	errs = append(errs, err)
	errs = append(errs, checkLabel("zone", c.Zone), checkLabel("rack", c.Rack), checkAbs("token_file", c.TokenFile))
	errs = append(errs, checkSupernodes("supernodes", c.Supernodes))
	return errors.Join(errs...)
}
