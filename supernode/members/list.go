package members

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/quiet"
	phost "github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/wire"
)

const (
	// maxMembers bounds the list; maxGroup a group, whose gateways must fit into
	// one message.
	maxMembers = 1 << 17
	maxGroup   = 1 << 16
)

// Config says where a List keeps its things and whom it lets in.
type Config struct {
	// Dir is the supernode's data directory; it must exist.
	Dir string
	// TokenFile has the tokens that nodes join with, one a line; empty: the file
	// token in Dir, which is made, with a random token, if there is none.
	TokenFile string
	// Key is the supernode's identity.
	Key crypto.PrivKey
	// Siblings are the other supernodes. They may connect without joining, and
	// their grants count.
	Siblings []peer.ID
	// Lease is after how much silence a node is no member any more; 15 s.
	Lease time.Duration
	Log   *slog.Logger // nil: no log
	// Registerer, if not nil, takes the metrics.
	Registerer prometheus.Registerer
}

// List is a supernode's list of members, with their groups. It implements
// host.Guard. It may be used from several goroutines.
type List struct {
	cfg      Config
	log      *slog.Logger
	tokens   *tokens
	revoked  *revoked
	granter  *granter
	siblings map[peer.ID]bool
	metrics  *metrics
	quiet    quiet.Quiet
	host     host.Host
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	work     chan struct{} // capacity 1: a group is dirty

	mu        sync.Mutex
	closed    bool
	members   map[peer.ID]*member
	groups    map[blockdev.Digest]*groupState
	strangers map[peer.ID]time.Time
	relays    map[relayKey]*relays
}

// member is a node that was let in. List.mu guards what changes.
type member struct {
	id       peer.ID
	key      wire.Key
	instance [wire.InstanceLen]byte
	zone     string
	rack     string
	upload   uint64
	message  *wire.GroupMember // how other nodes are told of it
	remote   string            // where its connection comes from
	token    tokenHash
	joined   time.Time
	groups   map[blockdev.Digest]*seat
	session  *session    // nil: it has lost it, and expiry runs
	expiry   *time.Timer // ends the membership
}

// groupState is a group with what pushing needs.
type groupState struct {
	*group
	dirty bool
	last  time.Time // of the last flush
}

// New reads token file and list of revoked nodes. It does nothing yet but guard:
// Start it with the host that it guards.
func New(c Config) (*List, error) {
	if c.Lease == 0 {
		c.Lease = 15 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	l := &List{
		cfg: c, log: c.Log,
		siblings:  map[peer.ID]bool{},
		work:      make(chan struct{}, 1),
		members:   map[peer.ID]*member{},
		groups:    map[blockdev.Digest]*groupState{},
		strangers: map[peer.ID]time.Time{},
		relays:    map[relayKey]*relays{},
	}
	for _, id := range c.Siblings {
		l.siblings[id] = true
	}
	path := c.TokenFile
	if path == "" {
		path = filepath.Join(c.Dir, "token")
		if err := MakeToken(path); err != nil {
			return nil, fmt.Errorf("supernode: %w", err)
		}
	}
	var err error
	if l.tokens, err = openTokens(path); err != nil {
		return nil, fmt.Errorf("supernode: %w", err)
	}
	if l.revoked, err = openRevoked(filepath.Join(c.Dir, "revoked")); err != nil {
		return nil, fmt.Errorf("supernode: %w", err)
	}
	if l.granter, err = newGranter(c.Key, c.Siblings); err != nil {
		return nil, fmt.Errorf("supernode: %w", err)
	}
	if l.metrics, err = newMetrics(l, c.Registerer); err != nil {
		return nil, err
	}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l, nil
}

// TokenFile is where the tokens are.
func (l *List) TokenFile() string { return l.tokens.path }

// Start serves the membership protocol on h, which l guards. Call it once.
func (l *List) Start(h host.Host) {
	l.host = h
	h.SetStreamHandler(members.Protocol, l.serve)
	l.wg.Go(l.push)
	l.wg.Go(l.sweep)
}

// Close ends all memberships. Close it before the host.
func (l *List) Close() error {
	l.cancel()
	if l.host != nil {
		l.host.RemoveStreamHandler(members.Protocol)
	}
	l.mu.Lock()
	l.closed = true
	for _, m := range l.members {
		l.removeLocked(m)
	}
	l.mu.Unlock()
	l.wg.Wait()
	l.metrics.unregister()
	return nil
}

// Grant returns what a peer shows to join the image's group. It is given to who
// got the image's indexes on the word of origin, a registry's host and repository.
func (l *List) Grant(id string, manifest blockdev.Digest, origin string) ([]byte, error) {
	p, err := peer.Decode(id)
	if err != nil {
		return nil, fmt.Errorf("grant for %q: %w", id, err)
	}
	key, ok := phost.Key(p)
	if !ok {
		return nil, fmt.Errorf("grant for %s, whose key is not Ed25519", p)
	}
	return l.granter.make(key, manifest, originOf(origin))
}

// add lets a node in that has said hello. Its error is for the node to know.
func (l *List) add(m *member, s *session) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return fmt.Errorf("the supernode is stopping: %w", blockdev.ErrUnavailable)
	}
	if old := l.members[m.id]; old != nil {
		if old.instance != m.instance && old.session != nil && !old.session.conn.IsClosed() {
			return fmt.Errorf("%w: one at %s, one at %s. If a machine was cloned, stop shoal on one and delete the file identity below its root",
				errTwice, old.remote, m.remote)
		}
		m.joined = old.joined
		l.removeLocked(old)
	} else if len(l.members) >= maxMembers {
		return fmt.Errorf("this supernode has %d members, which is its limit: %w", len(l.members), wire.ErrBusy)
	}
	m.session = s
	l.members[m.id] = m
	delete(l.strangers, m.id)
	return nil
}

var errTwice = errors.New("two nodes have the same identity")

// removeLocked ends a membership, with its session.
func (l *List) removeLocked(m *member) {
	if l.members[m.id] != m {
		return
	}
	delete(l.members, m.id)
	for id := range m.groups {
		l.leaveLocked(m, id)
	}
	if m.expiry != nil {
		m.expiry.Stop()
	}
	if m.session != nil {
		m.session.end(nil)
		m.session = nil
	}
}

// detach is called when a member's session has ended. bye: it said so, and is
// removed; else it stays for what is left of its lease, a duration from now.
func (l *List) detach(m *member, bye bool, lease time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.members[m.id] != m || m.session == nil {
		return
	}
	m.session = nil
	if bye || lease <= 0 {
		l.removeLocked(m)
		return
	}
	m.expiry = time.AfterFunc(lease, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.members[m.id] == m {
			l.log.Info("a node's lease is over", "node", m.id, "from", m.remote)
			l.metrics.expired.Inc()
			l.removeLocked(m)
			l.strangers[m.id] = cutOff
		}
	})
}

// join makes a member one of a group. If it is one already, it is told everything,
// unless all it wants to say is that it has the whole image now.
func (l *List) join(m *member, id blockdev.Digest, grant []byte, full bool) error {
	origin, err := l.granter.check(grant, m.key, id)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.members[m.id] != m {
		return fmt.Errorf("no member any more: %w", blockdev.ErrUnavailable)
	}
	g := l.groups[id]
	if s := m.groups[id]; s != nil {
		s.synced = s.synced && s.full != full
		s.setFull(full)
		s.origin = origin
	} else {
		if len(m.groups) >= wire.MaxGroups || g != nil && g.size >= maxGroup {
			return fmt.Errorf("the node is in %d groups, or the group is full: %w", len(m.groups), wire.ErrBusy)
		}
		if g == nil {
			g = &groupState{group: newGroup(id)}
			l.groups[id] = g
		}
		s := g.add(m)
		s.full, s.origin = full, origin
		m.groups[id] = s
		if r := l.relays[relayKey{id, m.zone}]; r != nil {
			r.add(m)
		}
	}
	l.dirtyLocked(g)
	return nil
}

func (l *List) leave(m *member, id blockdev.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.members[m.id] == m {
		l.leaveLocked(m, id)
	}
}

func (l *List) leaveLocked(m *member, id blockdev.Digest) {
	s, g := m.groups[id], l.groups[id]
	if s == nil {
		return
	}
	delete(m.groups, id)
	g.remove(s)
	if g.size == 0 {
		delete(l.groups, id)
		return
	}
	l.dirtyLocked(g)
}

// common returns the groups that a member shares with the peer of this key,
// joined.
func (l *List) common(m *member, key wire.Key) (joined []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	other := l.members[phost.FromKey(key)]
	if other == nil {
		return nil
	}
	for id := range m.groups {
		if other.groups[id] != nil {
			joined = append(joined, id[:]...)
		}
	}
	return joined
}

// Info describes a member to operators.
type Info struct {
	ID string
	// Address is where its connection comes from.
	Address string
	// Announced is where others are told to dial it, IP:port; none: it shares nothing.
	Announced  []string
	Zone, Rack string
	// MaxUpload is in bytes per second; 0: no limit.
	MaxUpload int64
	// Images is how many groups it is in.
	Images int
	// Seconds is for how long it has been a member.
	Seconds int64
	// Lost: it has no connection, and its lease runs out.
	Lost bool
	// Revoked: it is no member, and is not let in.
	Revoked bool
}

func (m *member) announced() []string {
	var out []string
	for _, b := range m.message.Addrs {
		if ap, err := wire.ParseAddr(b); err == nil { // dialable has made it
			out = append(out, ap.String())
		}
	}
	return out
}

// Members lists all members, and who is revoked.
func (l *List) Members() []Info {
	l.mu.Lock()
	var out []Info
	for _, m := range l.members {
		out = append(out, Info{
			ID: m.id.String(), Address: m.remote, Announced: m.announced(), Zone: m.zone, Rack: m.rack, MaxUpload: int64(m.upload),
			Images: len(m.groups), Seconds: int64(time.Since(m.joined).Seconds()), Lost: m.session == nil,
		})
	}
	l.mu.Unlock()
	for _, id := range l.revoked.list() {
		out = append(out, Info{ID: id.String(), Revoked: true})
	}
	slices.SortFunc(out, func(a, b Info) int {
		return strings.Compare(a.Zone+"\x00"+a.Rack+"\x00"+a.ID, b.Zone+"\x00"+b.Rack+"\x00"+b.ID)
	})
	return out
}

// Revoke ends the membership of a node and never lets it in again, until Allow.
// It need not be a member. That is kept in a file; if it cannot be written,
// nothing changes.
func (l *List) Revoke(id string) error {
	p, err := peer.Decode(id)
	if err != nil {
		return fmt.Errorf("%q is no peer ID: `shoal members` lists them", id)
	}
	if l.siblings[p] || p == l.hostID() {
		return fmt.Errorf("%s is a supernode, no node: take it out of the configs", p)
	}
	if err := l.revoked.set(p, true); err != nil {
		return err
	}
	l.mu.Lock()
	if m := l.members[p]; m != nil {
		if m.session != nil {
			m.session.end(errRevoked)
			m.session = nil
		}
		l.removeLocked(m)
		l.strangers[p] = cutOff
	}
	l.mu.Unlock()
	l.log.Warn("node revoked", "node", p)
	return nil
}

// Allow takes a Revoke back.
func (l *List) Allow(id string) error {
	p, err := peer.Decode(id)
	if err != nil {
		return fmt.Errorf("%q is no peer ID: `shoal members` lists them", id)
	}
	return l.revoked.set(p, false)
}

func (l *List) hostID() peer.ID {
	if l.host == nil {
		return ""
	}
	return l.host.ID()
}
