package members

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/wire"
)

const (
	// maxStrangers bounds how many peers may be connected that this node does
	// not know (yet): after a burst of joins, all of a cell.
	maxStrangers = 1024
	// strangerTime is how long they have to become known.
	strangerTime = 3 * time.Second
	// sweepEvery is how often connections are looked through for such as are not
	// to be there any more.
	sweepEvery = time.Second
	// yesTime and noTime are how long a supernode's answer counts. The first is
	// less than a lease.
	yesTime = 10 * time.Second
	noTime  = time.Second
	// maxAsked bounds the answers kept.
	maxAsked = 8192
)

// errStranger is the cause of all refusals here.
var errStranger = errors.New("no member of a group of this node")

// question is what supernodes are asked, or have said, about one peer.
type question struct {
	left   []*session // have not answered yet
	groups []blockdev.Digest
	until  time.Time // the answer counts; zero: there is none yet
}

func (q *question) waits(s *session) bool {
	i := slices.Index(q.left, s)
	if i < 0 {
		return false
	}
	q.left = slices.Delete(q.left, i, i+1)
	return true
}

// knows says whether the peer is in the group, or in any if group is zero. What
// supernodes have answered counts with the lists: a node knows the members of
// other cells by name only when they come.
func (n *Node) knowsLocked(group blockdev.Digest, id peer.ID, now time.Time) bool {
	var anyGroup blockdev.Digest
	if group == anyGroup {
		for _, g := range n.groups {
			if g.find(id) != nil {
				return true
			}
		}
	} else if g := n.groups[group]; g == nil {
		return false
	} else if g.find(id) != nil {
		return true
	}
	q := n.asked[id]
	if q == nil || !now.Before(q.until) {
		return false
	}
	for _, g := range q.groups {
		if (group == anyGroup || g == group) && n.groups[g] != nil {
			return true
		}
	}
	return false
}

// askLocked has the supernodes asked who the peer is, unless they have been;
// false: that is known to be nobody, or there is no supernode to ask.
func (n *Node) askLocked(id peer.ID, now time.Time) bool {
	q := n.asked[id]
	if q != nil && (q.until.IsZero() || now.Before(q.until)) {
		return q.until.IsZero()
	}
	key, ok := host.Key(id)
	if !ok {
		return false
	}
	q = &question{}
	for _, s := range n.sessions {
		if s.isJoined() {
			q.left = append(q.left, s)
			s.ask(key)
		}
	}
	if len(q.left) == 0 {
		return false
	}
	if len(n.asked) >= maxAsked {
		for id, old := range n.asked {
			if !old.until.IsZero() {
				delete(n.asked, id)
			}
		}
	}
	if len(n.asked) >= maxAsked {
		return false
	}
	n.asked[id] = q
	return true
}

// answer takes a supernode's answer.
func (n *Node) answer(s *session, a *wire.Answer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	id := host.FromKey(wire.Key(a.Key))
	q := n.asked[id]
	if q == nil || !q.waits(s) {
		return // not asked
	}
	for g := range wire.Keys(a.Groups) {
		// A supernode's word counts for the groups that it keeps.
		if own := n.groups[g]; own != nil && own.home == s {
			q.groups = append(q.groups, g)
		}
	}
	n.resolveLocked(id, q)
}

// resolveLocked ends a question when one supernode has said yes, or all are heard.
func (n *Node) resolveLocked(id peer.ID, q *question) {
	switch {
	case len(q.groups) > 0:
		q.until = time.Now().Add(yesTime)
	case len(q.left) == 0:
		q.until = time.Now().Add(noTime)
	default:
		return
	}
	n.changedLocked()
}

// Allowed returns nil if the peer is a member of the group, or one of this node's
// supernodes, and so may ask this node for its chunks. Where it is not on the list, supernodes are asked, and the
// call waits for them or for ctx: lists lag behind in a burst of joins, and name
// few members of other cells.
func (n *Node) Allowed(ctx context.Context, group blockdev.Digest, id peer.ID) error {
	if n.super[id] != nil {
		return nil
	}
	for {
		n.mu.Lock()
		now := time.Now()
		known := n.knowsLocked(group, id, now)
		asking := known || n.askLocked(id, now)
		changed := n.changed
		n.mu.Unlock()
		switch {
		case known:
			return nil
		case !asking:
			return fmt.Errorf("peer %s: %w", id, errStranger)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("peer %s: %w, as far as can be known now: %w", id, errStranger, ctx.Err())
		case <-n.ctx.Done():
			return fmt.Errorf("this node is stopping: %w", blockdev.ErrUnavailable)
		}
	}
}

// Connect implements host.Guard. Strangers may connect, some at a time: they may
// have joined a moment ago.
func (n *Node) Connect(id peer.ID, dir network.Direction) bool {
	if n.super[id] != nil {
		return true
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	if n.knowsLocked(blockdev.Digest{}, id, now) {
		return true
	}
	if dir == network.DirOutbound {
		return false
	}
	if _, ok := n.strangers[id]; ok {
		return true
	}
	if len(n.strangers) >= maxStrangers || !n.askLocked(id, now) {
		n.metrics.strangers.Inc()
		return false
	}
	n.strangers[id] = now
	return true
}

// Stream implements host.Guard.
func (n *Node) Stream(ctx context.Context, id peer.ID, _ protocol.ID) error {
	return n.Allowed(ctx, blockdev.Digest{}, id)
}

// sweep closes connections of peers that are no members, and drops views that are
// too old.
func (n *Node) sweep() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-n.ctx.Done():
			return
		}
		n.lookFull()
		n.expire(time.Now())
		for _, id := range n.host.Network().Peers() {
			if n.overdue(id, time.Now()) {
				n.metrics.strangers.Inc()
				n.log.Info("disconnecting a peer that is in no group of this node", "peer", id)
				_ = n.host.Network().ClosePeer(id) // gone already is as good
			}
		}
	}
}

// expire forgets what does not count any more.
func (n *Node) expire(now time.Time) {
	connected := map[peer.ID]bool{}
	for _, id := range n.host.Network().Peers() {
		connected[id] = true
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for id := range n.strangers {
		if !connected[id] {
			delete(n.strangers, id)
		}
	}
	for id, q := range n.asked {
		if !q.until.IsZero() && !now.Before(q.until) {
			delete(n.asked, id)
		}
	}
	if n.alone.IsZero() || now.Sub(n.alone) < n.cfg.Outage {
		return
	}
	for _, g := range n.groups {
		if g.view != nil {
			n.log.Warn("no supernode has answered for too long: asking no peers until one does", "manifest", g.id, "outage", n.cfg.Outage)
			g.drop()
		}
	}
	n.changedLocked()
}

// overdue says whether a connected peer is to be disconnected.
func (n *Node) overdue(id peer.ID, now time.Time) bool {
	if n.super[id] != nil {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.knowsLocked(blockdev.Digest{}, id, now) {
		delete(n.strangers, id)
		return false
	}
	since, ok := n.strangers[id]
	if !ok {
		n.strangers[id] = now
		n.askLocked(id, now)
		return false
	}
	if now.Sub(since) < strangerTime {
		n.askLocked(id, now)
		return false
	}
	return true
}
