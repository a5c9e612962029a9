package roster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/quiet"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/roster/cells"
	"github.com/shoalfs/shoal/p2p/wire"
)

// maxMembers bounds the list.
const maxMembers = 1 << 17

// Config says where a List keeps its files and which peers it lets in.
type Config struct {
	// Dir is the supernode's data directory; it must exist.
	Dir string
	// TokenFile has the tokens that nodes join with, one a line; empty: the file
	// token in Dir, which is made, with a random token, if there is none.
	TokenFile string
	// Key is the supernode's identity.
	Key crypto.PrivKey
	// Siblings are the other supernodes. They may connect without joining, and
	// their grants count. SetSiblings changes them.
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
	siblings *siblings
	metrics  *metrics
	quiet    quiet.Quiet
	host     libp2phost.Host
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	work     chan struct{} // capacity 1: a group is dirty

	mu        sync.Mutex
	closed    bool
	members   map[peer.ID]*member
	groups    map[blockdev.Digest]*group
	dirty     map[*group]struct{} // groups that have something to tell, or will have
	holders   int                 // seats of members that have all of their image
	strangers map[peer.ID]time.Time
	relays    map[relayKey]*relays
}

var _ host.Guard = (*List)(nil)

// member is a node that was let in. List.mu guards what changes.
type member struct {
	id       peer.ID
	key      wire.Key
	instance [wire.InstanceLen]byte
	zone     string
	rack     string
	upload   uint64
	as       *cells.Member // how other nodes are told of it
	remote   string        // where its connection comes from
	token    tokenHash
	joined   time.Time
	groups   map[blockdev.Digest]*place
	session  *session    // nil: it has lost it, and expiry runs
	stream   int         // how many sessions it has had; see place
	expiry   *time.Timer // ends the membership
	unproven *time.Timer // ends its places that it has not joined again since it came back
}

// New reads token file and list of revoked nodes. It does nothing yet but guard:
// Start it with the host that it guards.
func New(c Config) (*List, error) {
	defaults.Set(&c.Lease, 15*time.Second)
	defaults.Log(&c.Log)
	l := &List{
		cfg: c, log: c.Log,
		work:      make(chan struct{}, 1),
		members:   map[peer.ID]*member{},
		groups:    map[blockdev.Digest]*group{},
		dirty:     map[*group]struct{}{},
		strangers: map[peer.ID]time.Time{},
		relays:    map[relayKey]*relays{},
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
	if l.granter, err = newGranter(c.Key); err != nil {
		return nil, fmt.Errorf("supernode: %w", err)
	}
	l.siblings = newSiblings(l.revoked, l.cutOff, l.log)
	if err := l.SetSiblings(c.Siblings); err != nil {
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
func (l *List) Start(h libp2phost.Host) {
	l.host = h
	h.SetStreamHandler(members.Protocol, l.serve)
	l.wg.Go(l.push)
	l.wg.Go(l.sweep)
	l.siblings.start(h)
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
	l.siblings.close()
	l.wg.Wait()
	l.metrics.Unregister()
	return nil
}

// SetSiblings changes the list of the other supernodes. Those that are left out may not
// connect any more without joining, and grants that they give do not count.
func (l *List) SetSiblings(ids []peer.ID) error {
	if err := l.granter.trust(ids); err != nil {
		return err
	}
	l.siblings.set(ids)
	return nil
}

// Grant returns what a peer shows to join the image's group. It is given to a peer that
// got the image's indexes on the word of origin, a registry's host and repository.
func (l *List) Grant(id string, manifest blockdev.Digest, origin string) ([]byte, error) {
	p, err := peer.Decode(id)
	if err != nil {
		return nil, fmt.Errorf("grant for %q: %w", id, err)
	}
	key, ok := host.Key(p)
	if !ok {
		return nil, fmt.Errorf("grant for %s, whose key is not Ed25519", p)
	}
	return l.granter.make(key, manifest, originOf(origin))
}

// add lets a node in that has said hello. Its error is for the node to know. The
// member that it returns is m, or the one that m is again, with its places in groups.
func (l *List) add(m *member, s *session) (*member, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, fmt.Errorf("the supernode is stopping: %w", blockdev.ErrUnavailable)
	}
	old := l.members[m.id]
	switch {
	case old != nil && old.instance == m.instance && old.zone == m.zone && old.rack == m.rack:
		l.returnLocked(old, m, s)
		return old, nil
	case old != nil && old.instance != m.instance && old.session != nil && !old.session.conn.IsClosed():
		return nil, fmt.Errorf("%w: one at %s, one at %s. If a machine was cloned, stop shoal on one of the two and delete the file identity in its root",
			errTwice, old.remote, m.remote)
	case old != nil:
		m.joined = old.joined
		l.removeLocked(old)
	case len(l.members) >= maxMembers:
		return nil, fmt.Errorf("this supernode has %d members, which is its limit: %w", len(l.members), wire.ErrBusy)
	}
	m.session = s
	l.members[m.id] = m
	delete(l.strangers, m.id)
	return m, nil
}

var errTwice = errors.New("two nodes have the same identity")

// returnLocked gives a member that has come back, as m, its new session. Its places are
// kept for a lease: that is how long it has to say in which groups it still is.
func (l *List) returnLocked(old, m *member, s *session) {
	if old.expiry != nil {
		old.expiry.Stop()
	}
	if old.session != nil {
		old.session.end(nil)
	}
	changed := old.as.Message().Sum() != m.as.Message().Sum()
	old.session, old.as, old.remote, old.token, old.upload = s, m.as, m.remote, m.token, m.upload
	old.stream++
	if changed {
		for _, p := range old.groups {
			p.group.SetMember(p.seat, m.as)
			l.dirtyLocked(p.group)
		}
	}
	if old.unproven != nil {
		old.unproven.Stop()
	}
	stream := old.stream
	old.unproven = time.AfterFunc(l.cfg.Lease, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.members[old.id] != old || old.stream != stream {
			return
		}
		for id, p := range old.groups {
			if p.stream != stream {
				l.leaveLocked(old, id)
			}
		}
	})
}

// removeLocked ends a membership, with its session.
func (l *List) removeLocked(m *member) {
	if l.members[m.id] != m {
		return
	}
	delete(l.members, m.id)
	for id := range m.groups {
		l.leaveLocked(m, id)
	}
	for _, t := range []*time.Timer{m.expiry, m.unproven} {
		if t != nil {
			t.Stop()
		}
	}
	if m.session != nil {
		m.session.end(nil)
		m.session = nil
	}
}

// detach is called when a session has ended. bye: the member said so, and is removed;
// else it stays for what is left of its lease, a duration from now, unless it has got
// another session.
func (l *List) detach(m *member, s *session, bye bool, lease time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.members[m.id] != m || m.session != s {
		return
	}
	m.session = nil
	if bye || lease <= 0 {
		l.removeLocked(m)
		return
	}
	stream := m.stream
	m.expiry = time.AfterFunc(lease, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.members[m.id] == m && m.stream == stream {
			l.log.Info("a node's lease is over", "node", m.id, "from", m.remote)
			l.metrics.expired.Inc()
			l.removeLocked(m)
			l.strangers[m.id] = cutOff
		}
	})
}

// Revoke ends the membership of a node and never lets it in again, until Allow.
// It need not be a member. That is kept in a file; if it cannot be written,
// nothing changes.
func (l *List) Revoke(id string) error {
	p, err := peer.Decode(id)
	if err != nil {
		return fmt.Errorf("%q is not a peer ID: `shoal members` lists them", id)
	}
	if l.siblings.has(p) || p == l.hostID() {
		return fmt.Errorf("%s is a supernode, not a node: remove it from the configs", p)
	}
	if err := l.revoked.set(p, true); err != nil {
		return err
	}
	l.cutOff(p)
	signal(l.siblings.news)
	return nil
}

// cutOff ends the membership of a node that is revoked now.
func (l *List) cutOff(p peer.ID) {
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
}

// Allow takes a Revoke back.
func (l *List) Allow(id string) error {
	p, err := peer.Decode(id)
	if err != nil {
		return fmt.Errorf("%q is not a peer ID: `shoal members` lists them", id)
	}
	if err := l.revoked.set(p, false); err != nil {
		return err
	}
	signal(l.siblings.news)
	return nil
}

func (l *List) hostID() peer.ID {
	if l.host == nil {
		return ""
	}
	return l.host.ID()
}
