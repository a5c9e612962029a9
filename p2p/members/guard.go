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

var _ host.Guard = (*Node)(nil)

const (
	// maxStrangers bounds how many peers may be connected that this node does
	// not know (yet): after a burst of joins, all of a cell.
	maxStrangers = 1024
	// strangerTime is how long they have to become known.
	strangerTime = 3 * time.Second
	// sweepEvery is how often connections are looked through for such as are not
	// to be there any more.
	sweepEvery = time.Second
	// yesTime is how long a supernode's yes counts, for the groups that it names;
	// it is less than a lease.
	yesTime = 10 * time.Second
	// noTime is after what time supernodes are asked again about a peer of which they
	// said nothing good, againTime about one that they know: it may have joined a
	// further group.
	noTime    = time.Second
	againTime = 100 * time.Millisecond
	// askTime is how long an answer is waited for before the question is asked again.
	askTime = 3 * time.Second
	// maxAsked bounds the answers kept.
	maxAsked = 8192
)

// errStranger is the cause of all refusals here.
var errStranger = errors.New("not a member of a group of this node")

// question is what supernodes are asked, or have said, about one peer.
type question struct {
	left  []*session // have been asked and have not answered yet
	asked time.Time
	again time.Time // not to be asked before, once nobody is left
	// yes is the groups that a supernode has said the peer is in, and until when that
	// counts.
	yes map[blockdev.Digest]time.Time
}

func (q *question) waits(s *session) bool {
	i := slices.Index(q.left, s)
	if i < 0 {
		return false
	}
	q.left = slices.Delete(q.left, i, i+1)
	return true
}

// isAsked says whether an answer may still come.
func (q *question) isAsked(now time.Time) bool { return len(q.left) > 0 && now.Sub(q.asked) < askTime }

// known says whether there is a yes that counts.
func (q *question) known(now time.Time) bool {
	for _, until := range q.yes {
		if now.Before(until) {
			return true
		}
	}
	return false
}

// add notes a yes for a group.
func (q *question) add(group blockdev.Digest, now time.Time) {
	if q.yes == nil {
		q.yes = map[blockdev.Digest]time.Time{}
	}
	q.yes[group] = now.Add(yesTime)
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
	if q == nil {
		return false
	}
	if group != anyGroup {
		return now.Before(q.yes[group])
	}
	for g, until := range q.yes {
		if now.Before(until) && n.groups[g] != nil {
			return true
		}
	}
	return false
}

// askLocked makes the session writers ask the supernodes about the peer, unless they are being asked.
// With wait, they have said a moment ago that the peer is in other groups: call again
// after that time. False: they have answered what was asked at since or later, or the
// peer is known to be nobody, or there is no supernode to ask.
func (n *Node) askLocked(id peer.ID, since, now time.Time) (wait time.Duration, asking bool) {
	q := n.asked[id]
	switch {
	case q == nil:
	case q.isAsked(now):
		return 0, true
	case len(q.left) == 0 && !q.asked.Before(since):
		return 0, false
	case now.Before(q.again):
		return q.again.Sub(now), q.known(now)
	}
	key, ok := host.Key(id)
	if !ok {
		return 0, false
	}
	var left []*session
	for _, s := range n.super {
		if s.isJoined() {
			left = append(left, s)
		}
	}
	if len(left) == 0 {
		return 0, false
	}
	if q == nil {
		if q = n.questionLocked(id, now); q == nil {
			return 0, false
		}
	}
	q.left, q.asked = left, now
	for _, s := range left {
		s.ask(key)
	}
	return 0, true
}

// questionLocked adds what is known of a peer, nothing yet; nil: there is no room.
func (n *Node) questionLocked(id peer.ID, now time.Time) *question {
	if len(n.asked) >= maxAsked {
		for id, old := range n.asked {
			if !old.isAsked(now) {
				delete(n.asked, id)
			}
		}
	}
	if len(n.asked) >= maxAsked {
		return nil
	}
	q := &question{}
	n.asked[id] = q
	return q
}

// enterLocked notes that a peer is in a group, by a supernode's word. It changes
// nothing for a question that is being asked.
func (n *Node) enterLocked(id peer.ID, group blockdev.Digest, now time.Time) {
	q := n.asked[id]
	if q == nil {
		if q = n.questionLocked(id, now); q == nil {
			return
		}
	}
	q.add(group, now)
	n.changedLocked()
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
	now := time.Now()
	for g := range wire.Keys(a.Groups) {
		// A supernode's word counts for the groups that it keeps.
		if own := n.groups[g]; own != nil && own.home == s {
			q.add(g, now)
		}
	}
	n.heardLocked(q, now)
}

// heardLocked wakes those that wait for the answers to a question: there is one more,
// or one that cannot be read.
func (n *Node) heardLocked(q *question, now time.Time) {
	if len(q.left) == 0 {
		q.again = now.Add(noTime)
		if q.known(now) {
			q.again = now.Add(againTime)
		}
	}
	n.changedLocked()
}

// Allowed returns nil if the peer is a member of the group, or one of this node's
// supernodes, and so may ask this node for its chunks. Where it is not on the list, supernodes are asked, and the
// call waits for them or for ctx: lists lag behind in a burst of joins, and name
// few members of other cells.
func (n *Node) Allowed(ctx context.Context, group blockdev.Digest, id peer.ID) error {
	since := time.Now()
	for {
		n.mu.Lock()
		now := time.Now()
		known := n.super[id] != nil || n.knowsLocked(group, id, now)
		var wait time.Duration
		asking := known
		if !known {
			wait, asking = n.askLocked(id, since, now)
		}
		changed := n.changed
		n.mu.Unlock()
		switch {
		case known:
			return nil
		case !asking:
			return fmt.Errorf("peer %s: %w", id, errStranger)
		}
		if wait == 0 {
			wait = askTime // then the question is asked again
		}
		select {
		case <-changed:
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("peer %s: %w, and the supernode cannot be asked now: %w", id, errStranger, ctx.Err())
		case <-n.ctx.Done():
			return errStopping
		}
	}
}

// Connect implements host.Guard. Strangers may connect, some at a time: they may
// have joined a moment ago.
func (n *Node) Connect(id peer.ID, dir network.Direction) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	if n.super[id] != nil || n.knowsLocked(blockdev.Digest{}, id, now) {
		return true
	}
	if dir == network.DirOutbound {
		return false
	}
	if _, ok := n.strangers[id]; ok {
		return true
	}
	_, asking := n.askLocked(id, now, now)
	if len(n.strangers) >= maxStrangers || !asking {
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
				if others, say := n.quiet.Say("stranger", string(id), time.Now()); say {
					n.log.Info("disconnecting a peer that is in no group of this node", "peer", id, "others", others)
				}
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
		if len(q.left) == 0 && !now.Before(q.again) && !q.known(now) {
			delete(n.asked, id)
		}
	}
	if n.alone.IsZero() || now.Sub(n.alone) < n.cfg.Outage {
		return
	}
	for _, g := range n.groups {
		if g.view != nil {
			n.log.Warn("no supernode has answered for too long; this node asks no peers until a supernode answers", "manifest", g.id, "outage", n.cfg.Outage)
			g.drop()
		}
	}
	n.changedLocked()
}

// overdue says whether a connected peer is to be disconnected.
func (n *Node) overdue(id peer.ID, now time.Time) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.super[id] != nil || n.knowsLocked(blockdev.Digest{}, id, now) {
		delete(n.strangers, id)
		return false
	}
	since, ok := n.strangers[id]
	if !ok {
		n.strangers[id] = now
		n.askLocked(id, now, now)
		return false
	}
	if now.Sub(since) < strangerTime {
		n.askLocked(id, now, now)
		return false
	}
	return true
}
