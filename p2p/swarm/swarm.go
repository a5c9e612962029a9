package swarm

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/lru"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/route"
)

// Groups says with which peers this node shares chunks; members.Node is one.
type Groups interface {
	// Groups returns the groups of the images here that have this diff, the one
	// to ask first.
	Groups(diff blockdev.Digest) []blockdev.Digest
	// View returns what is known of a group, nil if that is nothing. Its members'
	// IDs are string(peer.ID), the bytes. A View must not be changed.
	View(group blockdev.Digest) *route.View
	// Changed returns a channel that is closed when any of these answers changes
	// after the call.
	Changed() <-chan struct{}
	// Addrs returns where a peer listens.
	Addrs(id peer.ID) (peer.AddrInfo, bool)
	// Allowed returns nil if the peer may ask for chunks of the group.
	Allowed(ctx context.Context, group blockdev.Digest, id peer.ID) error
}

var (
	_ blockdev.Source = (*Swarm)(nil)
	_ image.Source    = (*Swarm)(nil)
)

// Supernode is asked last for chunks, first for images, and alone for documents and with
// profiles.
type Supernode interface {
	blockdev.Source
	image.Source
	image.DocumentSource
	blockdev.ProfileSink
}

// Config of a Swarm. Host, Groups and Supernode are required; what else is zero
// gets its default.
type Config struct {
	Host      libp2phost.Host
	Groups    Groups
	Supernode Supernode
	// Enter makes this node a member of an image's group, and has it know nodes there
	// that the supernode has named; leave takes that back. nil: this node does not
	// listen, and all indexes come from the supernode.
	Enter func(img *image.Image, at []peer.AddrInfo) (leave func())
	// Zone and Rack are where this node is.
	Zone, Rack string
	// Intake is what chunks that come go through; Supernode's client should have the same.
	// Frames are passed on as they came; nil: everything is sent raw.
	Intake exchange.Intake
	// MaxPeers is how many peers may be connected for asking at a time: 128.
	// The peer that was asked longest ago makes room.
	MaxPeers int
	// IdlePeer is how long a peer is kept after the last request: 1 min.
	IdlePeer time.Duration
	Log      *slog.Logger // nil: no log
	// Registerer, if not nil, takes the metrics.
	Registerer prometheus.Registerer
}

// Swarm gets chunks from other nodes and gives chunks to them. What nodes do not give,
// documents above all, is its Supernode's. It may be used from several goroutines.
type Swarm struct {
	Supernode
	cfg     Config
	log     *slog.Logger
	self    route.Member
	book    *route.Book
	began   time.Time // the clock that route sees starts here
	pool    *pool
	metrics *metrics
	buffers exchange.Buffers
	opened  opened

	mu     sync.Mutex
	groups *lru.Map[blockdev.Digest, *group]
	begun  *lru.Map[blockdev.Digest, time.Time] // since when the first view of a group is awaited
	told   *lru.Map[peer.ID, struct{}]          // peers whose trouble is in the log
}

// group is a route.Group and the view that it was made of.
type group struct {
	*route.Group
	id   blockdev.Digest
	view *route.View
}

// New makes a Swarm. Close it before the host.
func New(c Config) (*Swarm, error) {
	if c.Host == nil || c.Groups == nil || c.Supernode == nil {
		return nil, errors.New("swarm: Host, Groups and Supernode must be set")
	}
	defaults.Log(&c.Log)
	if c.Intake.Window == nil {
		c.Intake.Window = exchange.NewLinkWindow()
	}
	defaults.Positive(&c.MaxPeers, 128)
	defaults.Positive(&c.IdlePeer, time.Minute)
	s := &Swarm{
		Supernode: c.Supernode, cfg: c, log: c.Log,
		self:   route.Member{ID: string(c.Host.ID()), Zone: c.Zone, Rack: c.Rack},
		book:   route.NewBook(route.BookOptions{}),
		began:  time.Now(),
		groups: lru.New[blockdev.Digest, *group](maxGroups), // of images that are gone, mostly
		begun:  lru.New[blockdev.Digest, time.Time](maxGroups),
		told:   lru.New[peer.ID, struct{}](maxTold),
		opened: opened{m: make(map[blockdev.Digest]*opening)},
	}
	s.pool = newPool(&s.cfg)
	m, err := newMetrics(c.Registerer, s)
	if err != nil {
		s.pool.close()
		return nil, err
	}
	s.metrics = m
	return s, nil
}

// Close ends all requests to peers. It does not close what Config names.
func (s *Swarm) Close() error {
	s.pool.close()
	s.metrics.Unregister()
	return nil
}

// Inflight is how many bytes of prefetch this node should have asked for and not got
// yet: what its deepest group wants (route.Table.Window).
func (s *Swarm) Inflight() int64 {
	most := (*route.Table)(nil).Inflight()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.groups.Values() {
		most = max(most, g.Table().Inflight())
	}
	return most
}

func (s *Swarm) now() time.Duration { return time.Since(s.began) }

// group returns the group to ask for chunks of a diff, nil if there are no peers
// to ask.
func (s *Swarm) group(diff blockdev.Digest) *group {
	for _, id := range s.cfg.Groups.Groups(diff) {
		v := s.cfg.Groups.View(id)
		if v == nil {
			continue
		}
		s.mu.Lock()
		g, _ := s.groups.Get(id)
		s.mu.Unlock()
		if g != nil && g.view == v {
			return g
		}
		t, err := route.NewTable(*v)
		if err != nil {
			s.log.Error("cannot use the supernode's list of a group; the image's chunks come from the supernode", "group", id, "error", err)
			continue
		}
		g = &group{Group: route.NewGroup(s.self, t, s.book), id: id, view: v}
		s.mu.Lock()
		s.groups.Add(id, g)
		s.mu.Unlock()
		return g
	}
	return nil
}

// firstView is how long prefetch waits, once for a group, to learn which others are in
// it. The first node learns at once that it is; when many nodes begin together, what each
// gets until it knows of the others comes from the supernode and through the zones'
// uplinks once for each. They learn of each other after
// 100 ms, of many hundreds after 500 (p2p/roster).
const firstView = 500 * time.Millisecond

// awaitGroup is group for prefetch: it waits, if this node has joined a group
// with the diff and has heard nothing of it yet.
func (s *Swarm) awaitGroup(ctx context.Context, diff blockdev.Digest) *group {
	for {
		changed := s.cfg.Groups.Changed()
		if g := s.group(diff); g != nil {
			return g
		}
		ids := s.cfg.Groups.Groups(diff)
		if len(ids) == 0 {
			return nil
		}
		left := time.Until(s.beginning(ids[0]).Add(firstView))
		if left <= 0 {
			return nil
		}
		select {
		case <-changed:
		case <-time.After(left):
		case <-ctx.Done():
			return nil
		}
	}
}

// beginning is when the first view of a group was waited for first.
func (s *Swarm) beginning(id blockdev.Digest) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.begun.Get(id)
	if !ok {
		t = time.Now()
		s.begun.Add(id, t)
	}
	return t
}

// maxGroups bounds the tables that are kept.
const maxGroups = 256

// zone says whether a peer is in this node's zone.
func (s *Swarm) zone(g *group, t route.Target) string {
	if t.Index >= 0 && g.Table().Member(t.Index).Zone == s.self.Zone {
		return sameZone
	}
	return otherZone
}

// report tells route, the metrics and, once for each peer until it is well again,
// the log what became of a chunk.
func (s *Swarm) report(g *group, a *route.Ask, t route.Target, o route.Outcome, took time.Duration, n int, cause error) {
	g.Report(a, t, o, s.now(), took, n)
	if t.Kind != route.Peer || o == route.OK {
		return
	}
	s.metrics.failures[o].Inc()
	if o == route.Busy || o == route.Missing || o == route.Slow {
		return
	}
	id := peer.ID(t.ID)
	s.mu.Lock()
	known := s.told.Contains(id)
	s.told.Add(id, struct{}{})
	s.mu.Unlock()
	if known {
		return
	}
	if o == route.Corrupt {
		s.log.Error("a peer sent wrong bytes or broke the protocol; it is left out for a while, and other sources are asked", "peer", id, "error", cause)
	} else {
		s.log.Warn("a peer does not answer; it is left out for a while", "peer", id, "error", cause)
	}
}

// well is called when a peer has sent a right chunk.
func (s *Swarm) well(t route.Target) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told.Remove(peer.ID(t.ID))
}

// maxTold bounds the peers that are remembered as logged.
const maxTold = 4096
