package supernode

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/pattern"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/supernode/access"
	"github.com/shoalfs/shoal/supernode/ingest"
	"github.com/shoalfs/shoal/supernode/profiles"
	"github.com/shoalfs/shoal/supernode/slots"
	"github.com/shoalfs/shoal/supernode/store"
)

// Config says where a supernode keeps its things and whom it trusts. Dir is
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
	// Grant, if not nil, makes blockdev.Image.Grant for a peer that got the image on
	// the word of origin, a registry's host and repository.
	Grant func(peer string, manifest blockdev.Digest, origin string) ([]byte, error)
	// Holders, if not nil, returns up to n nodes that have all of an image on the
	// word of origin, a registry's host and repository. They are asked for layers that no supernode
	// has any more, and closed then.
	Holders func(manifest blockdev.Digest, origin string, n int) []Holder
	// Relays, if not nil, returns nodes that have been given an image's indexes, for a
	// peer to ask for them; none: the supernode gives them itself.
	Relays func(ctx context.Context, peer string, manifest blockdev.Digest) []blockdev.Relay
	// Self is this supernode's peer ID, and Siblings are the other supernodes, by
	// theirs. All of them are to have the same list, each without itself: a layer
	// belongs to one by rendezvous hash of its DiffID. SetSiblings changes them.
	Self     peer.ID
	Siblings map[peer.ID]Sibling
	// Log gets what an operator should know; nil: nothing is logged.
	Log *slog.Logger
	// Registerer, if not nil, takes the metrics.
	Registerer prometheus.Registerer
}

func (c *Config) setDefaults() error {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.AccessTTL, 5*time.Minute)
	def(&c.AccessGrace, max(24*time.Hour, c.AccessTTL))
	def(&c.Lease, 30*time.Minute)
	if c.Ingests == 0 {
		c.Ingests = 4
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
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

// hostsFactor bounds work side by side with what registries may do while others are
// slow: so many times what there is for all.
const hostsFactor = 8

// spoolShare and manifestShare are the parts of the quota, one in so many, that
// are for layers while they come, and for manifests and configs, of which
// maxManifests is enough in any case.
const (
	spoolShare    = 5
	manifestShare = 32
	maxManifests  = 256 << 20 // bytes
)

// Supernode is a running supernode. It is safe for concurrent use. It implements
// exchange.Chunks, exchange.Images and exchange.Profiles for a server, and
// blockdev.Source, blockdev.ImageSource and blockdev.ProfileSink for the process
// that it lives in.
type Supernode struct {
	log       *slog.Logger
	reg       *registry.Client
	store     *store.Store
	access    *access.Access
	profiles  *profiles.Profiles
	ingest    *ingest.Ingester
	leases    *leases
	flights   *flight.Group[string, *progress]
	failed    *failures
	seen      *seen
	pinned    *pinned
	metrics   *metrics
	trusted   map[string]bool
	grant     func(peer string, manifest blockdev.Digest, origin string) ([]byte, error)
	holders   func(manifest blockdev.Digest, origin string, n int) []Holder
	relays    func(ctx context.Context, peer string, manifest blockdev.Digest) []blockdev.Relay
	indexes   *indexes
	self      peer.ID
	siblings  atomic.Pointer[siblings]
	verifying *slots.Slots // for verifications, by registry host
	restoring *slots.Slots // for layers that come from holders, by registry host
	decoder   *decoder

	closers []func() error

	mu      sync.Mutex
	closed  bool
	running sync.WaitGroup  // requests for images
	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
}

// New opens the data directory and starts a supernode. Its errors name what is
// wrong with the configuration or the directory.
func New(cfg Config) (*Supernode, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	if err := os.Mkdir(cfg.Dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("supernode: data directory: %w", err)
	}
	s := &Supernode{
		log:       cfg.Log,
		flights:   flight.New[string, *progress](outlives, errStopping),
		failed:    &failures{now: time.Now, errs: map[string]failure{}},
		seen:      newSeen(),
		grant:     cfg.Grant,
		holders:   cfg.Holders,
		relays:    cfg.Relays,
		self:      cfg.Self,
		trusted:   map[string]bool{},
		verifying: slots.New(cfg.Ingests, hostsFactor*cfg.Ingests),
		restoring: slots.New(maxRestores, hostsFactor*maxRestores),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.SetSiblings(cfg.Siblings)
	for _, h := range cfg.TrustedRegistries {
		s.trusted[strings.ToLower(h)] = true
	}
	if err := s.start(cfg); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// start opens the parts; what is open when it fails, Close closes.
func (s *Supernode) start(cfg Config) error {
	var err error
	if s.decoder, err = newDecoder(); err != nil {
		return err
	}
	s.onClose(s.decoder.close)
	manifests := int64(maxManifests)
	if cfg.Quota > 0 {
		manifests = max(1, min(manifests, cfg.Quota/manifestShare))
	}
	quota := max(0, cfg.Quota-cfg.Quota/spoolShare-manifests)
	// Before the store, which gives leases up when it is full of them.
	s.leases = newLeases(func(d blockdev.Digest) func() { return s.store.Pin(d) }, cfg.Lease)
	s.onClose(func() error { s.leases.close(); return nil })
	if s.store, err = store.Open(store.Config{Dir: filepath.Join(cfg.Dir, "store"), Quota: quota, Yield: s.leases.yield, Log: cfg.Log}); err != nil {
		return fmt.Errorf("supernode: %w", err)
	}
	s.onClose(s.store.Close)
	if s.pinned, err = openPinned(cfg.Dir, s.store.Pin); err != nil {
		return fmt.Errorf("supernode: %w", err)
	}
	s.indexes = newIndexes(s.store.Index, s.store.Touch)
	s.onClose(func() error { s.indexes.close(); return nil })
	if s.metrics, err = newMetrics(cfg.Registerer, s.store.Stats); err != nil {
		return fmt.Errorf("supernode: metrics: %w", err)
	}
	s.onClose(func() error { s.metrics.Unregister(); return nil })
	rc := cfg.Registry
	rc.HostDirs, rc.CacheDir, rc.CacheBytes = cfg.HostDirs, filepath.Join(cfg.Dir, "manifests"), manifests
	rc.Allowed = cfg.Allowed
	rc.Log, rc.Received = cfg.Log, s.metrics.received
	if s.reg, err = registry.New(rc); err != nil {
		return err
	}
	s.onClose(s.reg.Close)
	if s.access, err = access.Open(access.Config{Dir: cfg.Dir, Registry: s.reg, TTL: cfg.AccessTTL, Grace: cfg.AccessGrace, Log: cfg.Log}); err != nil {
		return fmt.Errorf("supernode: %w", err)
	}
	s.onClose(s.access.Close)
	if s.profiles, err = profiles.Open(cfg.Dir, cfg.Log, nil); err != nil {
		return fmt.Errorf("supernode: %w", err)
	}
	s.onClose(s.profiles.Close)
	s.ingest, err = ingest.New(ingest.Config{Store: s.store, SpoolDir: filepath.Join(cfg.Dir, "spool"), SpoolQuota: cfg.Quota / spoolShare,
		SpoolKey: "store.quota", Parallel: cfg.Ingests, Stall: cfg.Registry.Stall, Log: cfg.Log})
	if err != nil {
		return fmt.Errorf("supernode: %w", err)
	}
	s.onClose(s.ingest.Close)
	if err := s.metrics.watch(s, cfg.Registry.Download); err != nil {
		return fmt.Errorf("supernode: metrics: %w", err)
	}
	return nil
}

func (s *Supernode) onClose(f func() error) { s.closers = append(s.closers, f) }

// begin counts a request that runs; its context also ends with the supernode.
func (s *Supernode) begin(ctx context.Context) (_ context.Context, end func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, errStopping
	}
	s.running.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
		s.running.Done()
	}, nil
}

var errStopping = fmt.Errorf("the supernode is stopping: %w", blockdev.ErrUnavailable)

// Close ends running requests with blockdev.ErrUnavailable and running work (a
// layer that is half fetched goes on after the next start), and closes the store.
func (s *Supernode) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.running.Wait()
	s.flights.Close()
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i]())
	}
	s.closers = nil
	return errors.Join(errs...)
}

// Chunk implements exchange.Chunks. Knowing a chunk's digest is the right to
// have it. Errors wrap blockdev.ErrNotFound or blockdev.ErrCorrupt.
func (s *Supernode) Chunk(ctx context.Context, d blockdev.Digest) (exchange.Encoded, error) {
	c, err := s.store.Chunk(ctx, d)
	s.metrics.chunk(err, len(c.Data))
	if err != nil {
		return exchange.Encoded{}, err
	}
	return exchange.Encoded{Data: c.Data, Zstd: c.Zstd, Length: c.Length}, nil
}

// Allow sets which repositories may be asked for from now on; nil: all.
func (s *Supernode) Allow(list *pattern.Repositories) { s.reg.Allow(list) }

// LimitDownload changes how many bytes of layers a second are taken from registries; 0:
// no limit.
func (s *Supernode) LimitDownload(rate int64) { s.reg.Limit(rate) }

// Healthy returns nil if the supernode can work: its disk takes writes and holds
// what it says.
func (s *Supernode) Healthy() error { return s.access.Healthy() }
