package supernode

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/pattern"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/tasks"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/supernode/access"
	"github.com/shoalfs/shoal/supernode/ingest"
	"github.com/shoalfs/shoal/supernode/layers"
	"github.com/shoalfs/shoal/supernode/profiles"
	"github.com/shoalfs/shoal/supernode/store"
)

// Config says where a supernode keeps its files and which registries it trusts. Dir is
// required; the zero value of the others stands for the default.
type Config struct {
	// Dir is the data directory; it is made if its parent is there. One process
	// at a time uses it.
	Dir string
	// Quota bounds chunks, indexes, manifests and layers that are being fetched
	// together, in bytes on disk; 0: what the file system has. A fifth of it is for
	// the latter, and up to 256 MiB, or a 32nd of it, for manifests.
	Quota int64
	// HostDirs are containerd's certs.d directories (hosts.toml).
	HostDirs []string
	// TrustedRegistries are registry hosts, as in references, whose word that a
	// repository has a layer counts also for layers that were fetched from other
	// registries.
	TrustedRegistries []string
	// Allowed are the repositories that registries and mirrors may be asked for, and
	// that anybody is given; nil: all. Allow changes it.
	Allowed *pattern.Repositories
	// AccessTTL is how long a registry's permission to pull is cached; 5 min.
	AccessTTL time.Duration
	// AccessGrace is how long a peer that had access keeps it, with the same
	// credential, while the registry is down, and how long what was public stays so;
	// 24 h, at least AccessTTL.
	AccessGrace time.Duration
	// Lease is how long a layer that was asked for is not evicted, as long as there
	// are others to evict; 30 min.
	Lease time.Duration
	// Ingests is how many large layers are fetched at the same time; 4. Small
	// ones do not wait for them.
	Ingests int
	// Registry sets timeouts of the registry client. Its directories, log and
	// counter are set here.
	Registry registry.Config
	// Grant, if not nil, makes image.Image.Grant for a peer that got the image on
	// the word of origin, a registry's host and repository.
	Grant func(peer string, manifest blockdev.Digest, origin string) ([]byte, error)
	// Holders, if not nil, returns up to n nodes that have all of an image on the
	// word of origin, a registry's host and repository. They are asked for layers that no supernode
	// has any more, and closed then.
	Holders func(manifest blockdev.Digest, origin string, n int) []layers.Holder
	// Relays, if not nil, returns nodes that have been given an image's indexes, for a
	// peer to ask for them; none: the supernode gives them itself.
	Relays func(ctx context.Context, peer string, manifest blockdev.Digest) []image.Relay
	// Self is this supernode's peer ID, and Siblings are the other supernodes, by
	// theirs. All of them are to have the same list, each without itself: a layer
	// belongs to one by rendezvous hash of its DiffID. SetSiblings changes them.
	Self     peer.ID
	Siblings map[peer.ID]layers.Sibling
	// Log gets what an operator should know; nil: nothing is logged.
	Log *slog.Logger
	// Registerer, if not nil, takes the metrics.
	Registerer prometheus.Registerer

	now func() time.Time // tests give their own
}

func (c *Config) setDefaults() error {
	defaults.Set(&c.AccessTTL, 5*time.Minute)
	defaults.Set(&c.AccessGrace, max(24*time.Hour, c.AccessTTL))
	defaults.Set(&c.Lease, 30*time.Minute)
	defaults.Set(&c.Ingests, 4)
	defaults.Log(&c.Log)
	switch {
	case c.Dir == "":
		return errors.New("supernode: no data directory is given")
	case c.AccessTTL < 0 || c.Lease < 0 || c.Ingests < 0 || c.Quota < 0:
		return errors.New("supernode: a duration, the quota or the number of ingests is negative")
	case c.AccessGrace < c.AccessTTL:
		return fmt.Errorf("supernode: AccessGrace (%s) is shorter than AccessTTL (%s): a registry's permission would count for less time while the registry is down than while it is up", c.AccessGrace, c.AccessTTL)
	}
	return nil
}

// spoolShare and manifestShare are the parts of the quota, one in so many, that
// are for layers while they come, and for manifests and configs, of which
// maxManifests is enough in any case.
const (
	spoolShare    = 5
	manifestShare = 32
	maxManifests  = 256 << 20 // bytes
)

// Supernode is a running supernode. It is safe for concurrent use.
type Supernode struct {
	registry *registry.Client
	store    *store.Store
	access   *access.Access
	layers   *layers.Layers
	indexes  *indexes
	profiles *profiles.Profiles
	stock    *Stock
	grant    func(peer string, manifest blockdev.Digest, origin string) ([]byte, error)
	relays   func(ctx context.Context, peer string, manifest blockdev.Digest) []image.Relay
	decoder  *decoder
	metrics  *metrics
	requests requests
	closers  tasks.Closers
}

// What a server of p2p/exchange serves nodes from, and what the process that the
// supernode lives in has of it.
var (
	_ exchange.Chunks      = (*Supernode)(nil)
	_ exchange.Images      = (*Supernode)(nil)
	_ exchange.Documents   = (*Supernode)(nil)
	_ exchange.Profiles    = (*Supernode)(nil)
	_ blockdev.Source      = (*Supernode)(nil)
	_ image.Source         = (*Supernode)(nil)
	_ image.DocumentSource = (*Supernode)(nil)
	_ blockdev.ProfileSink = (*Supernode)(nil)
)

// New opens the data directory and starts a supernode. Its errors name what is
// wrong with the configuration or the directory.
func New(cfg Config) (*Supernode, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	if err := os.Mkdir(cfg.Dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("supernode: data directory: %w", err)
	}
	s := &Supernode{grant: cfg.Grant, relays: cfg.Relays, requests: requests{tasks.New()}}
	if err := s.open(cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("supernode: %w", err), s.Close())
	}
	return s, nil
}

// open opens the parts; what is open when it fails, Close closes.
func (s *Supernode) open(cfg Config) error {
	var err error
	if s.decoder, err = newDecoder(); err != nil {
		return err
	}
	s.closers.Add(s.decoder.close)
	manifests := int64(maxManifests)
	if cfg.Quota > 0 {
		manifests = max(1, min(manifests, cfg.Quota/manifestShare))
	}
	quota := max(0, cfg.Quota-cfg.Quota/spoolShare-manifests)
	// Before the store, which gives leases up when it is full of them.
	leases := layers.NewLeases(cfg.Lease)
	s.closers.Add(leases.Close)
	if s.store, err = store.Open(store.Config{Dir: filepath.Join(cfg.Dir, "store"), Quota: quota, Yield: leases.Yield, Log: cfg.Log}); err != nil {
		return err
	}
	s.closers.Add(s.store.Close)
	s.indexes = newIndexes(s.store.Index, s.store.Touch)
	s.closers.Add(s.indexes.close)
	if s.metrics, err = newMetrics(cfg.Registerer, s.store.Stats); err != nil {
		return err
	}
	s.closers.Add(func() error { s.metrics.Unregister(); return nil })
	rc := cfg.Registry
	rc.HostDirs, rc.CacheDir, rc.CacheBytes = cfg.HostDirs, filepath.Join(cfg.Dir, "manifests"), manifests
	rc.Allowed = cfg.Allowed
	rc.Log, rc.Received = cfg.Log, s.metrics.received
	if s.registry, err = registry.New(rc); err != nil {
		return err
	}
	s.closers.Add(s.registry.Close)
	if s.stock, err = openStock(cfg.Dir, s); err != nil {
		return err
	}
	if s.access, err = access.Open(access.Config{Dir: cfg.Dir, Registry: s.registry, TTL: cfg.AccessTTL, Grace: cfg.AccessGrace, Log: cfg.Log, Now: cfg.now}); err != nil {
		return err
	}
	s.closers.Add(s.access.Close)
	if s.profiles, err = profiles.Open(cfg.Dir, cfg.Log, cfg.now); err != nil {
		return err
	}
	s.closers.Add(s.profiles.Close)
	s.layers, err = layers.New(layers.Config{
		Store: s.store, Registry: s.registry, Leases: leases, Trusted: cfg.TrustedRegistries,
		Ingest: ingest.Config{SpoolDir: filepath.Join(cfg.Dir, "spool"), SpoolQuota: cfg.Quota / spoolShare, SpoolKey: "store.quota",
			Parallel: cfg.Ingests, Stall: cfg.Registry.Stall},
		Holders: cfg.Holders, Self: cfg.Self, Siblings: cfg.Siblings, Log: cfg.Log, Registerer: cfg.Registerer, Now: cfg.now,
	})
	if err != nil {
		return err
	}
	s.closers.Add(s.layers.Close)
	return s.metrics.watch(s.layers, cfg.Registry.Download)
}

// Close ends running requests with blockdev.ErrUnavailable and running work (a
// layer that is half fetched goes on after the next start), and closes the store.
func (s *Supernode) Close() error {
	s.requests.Close()
	return s.closers.Close()
}

// SetSiblings changes Config.Siblings for requests that begin from now on. What those that
// are left out are being asked is theirs to end.
func (s *Supernode) SetSiblings(list map[peer.ID]layers.Sibling) { s.layers.SetSiblings(list) }

// Allow sets which repositories may be asked for from now on; nil: all.
func (s *Supernode) Allow(list *pattern.Repositories) { s.registry.Allow(list) }

// LimitDownload changes how many bytes of layers a second are taken from registries; 0:
// no limit.
func (s *Supernode) LimitDownload(rate int64) { s.registry.Limit(rate) }

// Stock is what is stored, for an operator.
func (s *Supernode) Stock() *Stock { return s.stock }

// Healthy returns nil if the supernode can work: its disk takes writes and holds
// what it says.
func (s *Supernode) Healthy() error { return s.access.Healthy() }
