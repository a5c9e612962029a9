package members

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/quiet"
	"github.com/shoalfs/shoal/p2p/wire"
)

// Protocol is the ID of the membership protocol.
const Protocol = "/shoal/member/1"

// Config says which node this is and which supernodes it joins.
type Config struct {
	// Supernodes are joined, each of them. Their order does not matter. SetSupernodes
	// changes them.
	Supernodes []peer.AddrInfo
	// Token returns the token to join with. It is called for each attempt, so
	// that a file that has changed counts at once.
	Token func() (string, error)
	// Zone and Rack are where this node is, at most 64 bytes each; may be empty.
	Zone, Rack string
	// MaxUpload is how many bytes per second this node will send to others;
	// 0: no limit.
	MaxUpload int64
	// Announce is where others are to dial this node; empty: at the interface over which
	// it reaches the supernode (host.Toward).
	Announce []netip.AddrPort
	// Outage is for how long views count while no supernode answers; 10 min.
	Outage time.Duration
	// Failover is how long a group's home may be away before the group moves to
	// the next supernode; 3 s, which is more than a restart takes.
	Failover time.Duration
	Log      *slog.Logger // nil: no log
	// Registerer, if not nil, takes the metrics.
	Registerer prometheus.Registerer
}

// Node is a node's membership. It implements host.Guard. It may be used from
// several goroutines.
type Node struct {
	cfg      Config
	log      *slog.Logger
	instance [wire.InstanceLen]byte
	metrics  *metrics
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	host     libp2phost.Host // set by Start
	complete atomic.Pointer[func(blockdev.Digest) bool]
	quiet    quiet.Quiet
	answered atomic.Bool // a supernode has let this node in

	mu        sync.Mutex
	super     map[peer.ID]*session
	groups    map[blockdev.Digest]*group
	byDiff    map[blockdev.Digest][]*group // those that have a diff
	changed   chan struct{}                // closed, and made again, when views or answers change
	strangers map[peer.ID]time.Time
	asked     map[peer.ID]*question
	alone     time.Time // since when no supernode has us; zero: one has
}

// New checks c and makes a Node that does nothing yet but guard: Start it with
// the host that it guards.
func New(c Config) (*Node, error) {
	if c.Token == nil {
		return nil, errors.New("members: no token")
	}
	for name, label := range map[string]string{"zone": c.Zone, "rack": c.Rack} {
		if err := wire.CheckLabel(name, label); err != nil {
			return nil, fmt.Errorf("members: %w", err)
		}
	}
	if c.MaxUpload < 0 {
		return nil, fmt.Errorf("members: upload budget of %d bytes per second", c.MaxUpload)
	}
	defaults.Set(&c.Outage, 10*time.Minute)
	defaults.Set(&c.Failover, 3*time.Second)
	defaults.Log(&c.Log)
	n := &Node{
		cfg: c, log: c.Log,
		groups:    map[blockdev.Digest]*group{},
		byDiff:    map[blockdev.Digest][]*group{},
		changed:   make(chan struct{}),
		strangers: map[peer.ID]time.Time{},
		asked:     map[peer.ID]*question{},
		alone:     time.Now(),
	}
	if _, err := rand.Read(n.instance[:]); err != nil {
		return nil, fmt.Errorf("members: %w", err)
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	var err error
	if n.super, err = n.sessionsWith(c.Supernodes); err != nil {
		return nil, fmt.Errorf("members: %w", err)
	}
	if n.metrics, err = newMetrics(n, c.Registerer); err != nil {
		return nil, err
	}
	return n, nil
}

// Start joins the supernodes on h, which n guards. Call it once.
func (n *Node) Start(h libp2phost.Host) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.super[h.ID()] != nil {
		return ownIdentity(h)
	}
	n.host = h
	for _, s := range n.super {
		n.wg.Go(s.run)
	}
	n.wg.Go(n.sweep)
	return nil
}

func ownIdentity(h libp2phost.Host) error {
	return fmt.Errorf("supernode %s: that is this machine's own identity", h.ID())
}

// Close says goodbye to the supernodes. Close it before the host.
func (n *Node) Close() error {
	n.mu.Lock()
	n.cancel()
	n.mu.Unlock()
	n.wg.Wait()
	n.metrics.Unregister()
	return nil
}

// Ready returns nil once the supernode has let this node in, on the connection
// that there is now. It waits for an attempt that is under way. Its error wraps
// blockdev.ErrUnavailable, or is the context's, and says why not.
func (n *Node) Ready(ctx context.Context, supernode peer.ID) error {
	s := n.session(supernode)
	if s == nil {
		return fmt.Errorf("%s is not one of this node's supernodes: %w", supernode, blockdev.ErrUnavailable)
	}
	return s.ready(ctx)
}

// Answered returns nil once a supernode has let this node in, also if the membership
// has ended since. Its error wraps blockdev.ErrUnavailable and says why none has.
func (n *Node) Answered() error {
	if n.answered.Load() {
		return nil
	}
	errs := []error{fmt.Errorf("no supernode has let this node in since it started: %w", blockdev.ErrUnavailable)}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.super {
		s.mu.Lock()
		if s.err != nil {
			errs = append(errs, fmt.Errorf("supernode %s: %w", s.info.ID, s.err))
		}
		s.mu.Unlock()
	}
	return errors.Join(errs...)
}

// Join makes this node a member of an image's group. It returns at once; the
// view comes later, and again after supernodes have been away. Joining a group
// that this node is in already replaces diffs, those of the image's layers, and grant,
// which came with the indexes (image.Image.Grant).
func (n *Node) Join(manifest blockdev.Digest, diffs []blockdev.Digest, grant []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.joinLocked(manifest, diffs, grant)
}

// Enter is Join for an image whose indexes these peers have, which a supernode has
// named: this node may connect to them, although its views do not have them yet. leave
// takes it back, unless this node was in the group before.
func (n *Node) Enter(im *image.Image, peers []peer.AddrInfo) (leave func()) {
	diffs := make([]blockdev.Digest, len(im.Layers))
	for i, l := range im.Layers {
		diffs[i] = l.DiffID
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	before := n.groups[im.Manifest] != nil
	n.joinLocked(im.Manifest, diffs, im.Grant)
	for _, p := range peers {
		n.enterLocked(p.ID, im.Manifest, time.Now())
	}
	return func() {
		if !before {
			n.Leave(im.Manifest)
		}
	}
}

func (n *Node) joinLocked(manifest blockdev.Digest, diffs []blockdev.Digest, grant []byte) {
	g := n.groups[manifest]
	if g == nil {
		if len(n.groups) >= wire.MaxGroups {
			n.log.Warn("this node is in too many groups; the chunks of this image come from the supernode only", "manifest", manifest, "groups", len(n.groups))
			return
		}
		g = &group{id: manifest}
		n.groups[manifest] = g
	}
	again := g.home != nil && g.refused && string(g.grant) != string(grant)
	n.setDiffsLocked(g, diffs)
	g.grant = grant
	if again {
		g.refused = false
		g.home.want(g.id, true)
	}
	n.rehomeLocked(g)
}

// Leave ends the membership in an image's group.
func (n *Node) Leave(manifest blockdev.Digest) {
	n.mu.Lock()
	defer n.mu.Unlock()
	g := n.groups[manifest]
	if g == nil {
		return
	}
	delete(n.groups, manifest)
	n.setDiffsLocked(g, nil)
	if g.home != nil {
		g.home.want(g.id, false)
	}
	n.changedLocked()
}

// changedLocked wakes the callers that wait for a change.
func (n *Node) changedLocked() {
	close(n.changed)
	n.changed = make(chan struct{})
}

// Changed returns a channel that is closed when any view changes after the call.
func (n *Node) Changed() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}
