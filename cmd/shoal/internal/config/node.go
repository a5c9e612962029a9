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
	Never    []string               `toml:"never" comment:"images that containerd unpacks in the ordinary way, whatever lazy says"`
	Eager    []string               `toml:"eager" comment:"images whose pull ends only when every byte is here and proven"`
	Prefetch map[string]policy.Mode `toml:"prefetch" comment:"pattern = \"all\", \"startup\" or \"none\", instead of the key prefetch; the pattern that says most of an image's name counts"`
}

// Node is the file of `shoal node`.
type Node struct {
	Version                 int         `toml:"version"`
	Root                    string      `toml:"root" comment:"indexes, local diffs and mounts are kept here; a short path leaves room for images of many layers"`
	Address                 string      `toml:"address" comment:"Unix socket for containerd: [proxy_plugins.shoal] address"`
	ControlAddress          string      `toml:"control_address" comment:"Unix socket for shoal status, prefetch and check"`
	MetricsAddress          string      `toml:"metrics_address" comment:"host:port for Prometheus (/metrics), /healthz and /readyz; empty: off"`
	MirrorAddress           string      `toml:"mirror_address" comment:"host:port of the registry mirror that containerd's hosts.toml names; keep it on loopback; empty: off"`
	MirrorPlainHTTP         bool        `toml:"mirror_plain_http" comment:"true: the mirror speaks HTTP and not TLS. containerd then tells whoever has its port, while shoal has not, the credentials of every pull"`
	Supernodes              []string    `toml:"supernodes" comment:"each as shoal supernode prints it, ID@host:port; empty: this node embeds a supernode"`
	TokenFile               string      `toml:"token_file" comment:"the token to join the supernodes with: a copy of the one that the supernode has, or made, at the start"`
	Listen                  []string    `toml:"listen" comment:"host:port addresses for other nodes; without a host: all of this machine, IPv4 and IPv6; empty: this node shares nothing"`
	Announce                []string    `toml:"announce" comment:"IP:port addresses where other nodes are told to dial this one, such as that of a NAT; empty: those of the network interface over which it reaches the supernode"`
	Zone                    string      `toml:"zone" comment:"where this node is: traffic between zones is kept low; may be empty"`
	Rack                    string      `toml:"rack" comment:"where in the zone; may be empty"`
	MaxUpload               Size        `toml:"max_upload" comment:"bytes a second that this node sends to other nodes; 0: no limit"`
	MaxDownload             Size        `toml:"max_download" comment:"bytes a second of chunks that this node takes from other nodes and supernodes; 0: no limit"`
	DockerConfig            string      `toml:"docker_config" comment:"directory of docker's config.json with registry credentials, for shoal prefetch; empty: $DOCKER_CONFIG or ~/.docker"`
	NodeCredentialsForPulls bool        `toml:"node_credentials_for_pulls" comment:"true: EVERY container of this machine may run EVERY image that the credentials in docker_config open, with no pull secret of its own. false: a private image is lazy for pulls that show a credential of their own, through the mirror"`
	IndexTimeout            Duration    `toml:"index_timeout" comment:"how long an image's indexes may take to come: they are waited for that long, and kept for the next pull"`
	PrepareTimeout          Duration    `toml:"prepare_timeout" comment:"how long a call of containerd waits for an image's indexes before containerd unpacks it in the ordinary way. Its garbage collection, and with that all pods of the node, wait behind such a call: longer is more lazy pulls, and longer stalls"`
	ReadTimeout             Duration    `toml:"read_timeout" comment:"how long a container's read may wait for bytes before it fails"`
	CacheQuota              Size        `toml:"cache_quota" comment:"bytes on disk for layers; 0: what the disk has. What no container or image uses makes room; what does not fit is read without being kept"`
	Prefetch                policy.Mode `toml:"prefetch" comment:"what is fetched of a lazy image besides what containers read: all of it (all), what containers read at their start (startup), or nothing (none)"`
	PrefetchAfterPull       bool        `toml:"prefetch_after_pull" comment:"an image that was pulled and that no container has followed yet is fetched, too, as prefetch says"`
	PrefetchAfterExit       bool        `toml:"prefetch_after_exit" comment:"an image goes on being fetched when its last container has ended"`
	PrefetchRate            Size        `toml:"prefetch_rate" comment:"bytes a second, uncompressed, that are fetched for nobody who waits; what containers read, now or at their start, and pulls that wait for all bytes are not held to it; 0: no limit"`
	Mount                   string      `toml:"mount" comment:"how layers are mounted: file (from their files, Linux 6.12) or loop (through loop devices, which is slower: for programs that open files of images with O_DIRECT; docs/limits.md says what it costs)"`
	ScrubInterval           Duration    `toml:"scrub_interval" comment:"how often everything on this disk is read and checked, at 32 MiB/s at most; 0s: never"`
	RegistryConfigPath      string      `toml:"registry_config_path" comment:"containerd's directory of hosts.toml files, for layers that no supernode has and this node reads from the registry itself"`
	Images                  Images      `toml:"images" comment:"rules for images by their names. An asterisk stands for any characters: \"registry.example.com/base/*\", \"docker.io/library/redis:7*\"; without a tag a pattern fits every tag"`
	Embedded                Embedded    `toml:"embedded" comment:"the supernode of a node that names none"`
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
		return nil, errors.New("announce is set and listen is empty: others would be told of a node that shares nothing")
	}
	if len(c.Announce) > wire.MaxAddrs {
		return nil, fmt.Errorf("announce has %d addresses: at most %d are told", len(c.Announce), wire.MaxAddrs)
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
		errs = append(errs, fmt.Errorf("cache_quota is %d bytes: it must be at least 64MiB, or 0 for what the disk has", q))
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
		errs = append(errs, errors.New("supernodes and embedded are both set: a node that names supernodes embeds none, so say store and registry in the supernode's own file"))
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
