package members

import (
	"net"
	"net/netip"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/p2p/wire"
)

func tcpAddr(ap netip.AddrPort) net.Addr { return net.TCPAddrFromAddrPort(ap) }

// rehomeLocked gives a group the first supernode, in its order, that has let this
// node in.
func (n *Node) rehomeLocked(g *group) {
	ids := make([]peer.ID, 0, len(n.super))
	for id, s := range n.super {
		if s.isJoined() {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return
	}
	best := n.super[route.Order(g.id, ids)[0]]
	if g.home == best {
		return
	}
	if g.home != nil {
		g.home.want(g.id, false)
	}
	g.home, g.refused = best, false
	best.want(g.id, true)
}

func (s *session) isJoined() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.joined != nil && !s.joined.IsClosed()
}

// arrived is called when s has let this node in: it gets the groups that are its
// own, and those that it had before.
func (n *Node) arrived(s *session) {
	n.answered.Store(true)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.alone = time.Time{}
	s.stream++
	for _, g := range n.groups {
		if g.home == s {
			g.refused = false
			s.want(g.id, true)
		} else {
			n.rehomeLocked(g)
		}
	}
}

// lost is called when this node is no member of s any more. Its groups keep their
// view; after a while they move to another supernode.
func (n *Node) lost(s *session) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.unansweredLocked(s)
	if n.alone.IsZero() && !n.anyJoined() {
		n.alone = time.Now()
	}
	time.AfterFunc(n.cfg.Failover, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.ctx.Err() != nil || s.isJoined() {
			return
		}
		for _, g := range n.groups {
			if g.home == s {
				n.rehomeLocked(g)
			}
		}
	})
}

// unansweredLocked ends the wait for answers of s.
func (n *Node) unansweredLocked(s *session) {
	now := time.Now()
	for _, q := range n.asked {
		if q.waits(s) {
			n.heardLocked(q, now)
		}
	}
}

func (n *Node) anyJoined() bool {
	for _, s := range n.super {
		if s.isJoined() {
			return true
		}
	}
	return false
}

// refused is called when s has said no: what this node knows from it, it is not to
// know any more.
func (n *Node) refused(s *session) {
	n.metrics.refused.Inc()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, g := range n.groups {
		if g.from == s {
			g.drop()
		}
	}
	n.changedLocked()
}

// update takes a supernode's word on a group.
func (n *Node) update(s *session, u *wire.GroupUpdate) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	g := n.groups[blockdev.Digest(u.Group)]
	if g == nil || g.home != s {
		return nil // left, or moved, since
	}
	if err := g.apply(s, u); err != nil {
		g.anew = true
		return err
	}
	n.changedLocked()
	return nil
}

// groupRefused is called when s does not let this node into a group.
func (n *Node) groupRefused(s *session, id blockdev.Digest, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	g := n.groups[id]
	if g == nil || g.home != s {
		return
	}
	n.metrics.groupsRefused.Inc()
	n.log.Warn("the supernode does not let this node into an image's group; the image's chunks come from the supernode only", "manifest", id, "peer", s.info.ID, "error", err)
	g.refused = true
	g.drop()
	n.changedLocked()
}

// joinMessage returns what to join a group of s with; nil: it is not s's any more.
func (n *Node) joinMessage(s *session, id blockdev.Digest) *wire.GroupJoin {
	n.mu.Lock()
	defer n.mu.Unlock()
	g := n.groups[id]
	if g == nil || g.home != s {
		return nil
	}
	return &wire.GroupJoin{Group: id[:], Grant: g.grant, Full: g.full, Have: g.have(s)}
}

// Watch has n look, every second, whether images have become complete: complete
// says so of a diff, and must not block. Others in the group prefer to ask a node
// that has everything if no other node is left to ask.
func (n *Node) Watch(complete func(diff blockdev.Digest) bool) { n.complete.Store(&complete) }

// lookFull finds images that are complete now, or not any more.
func (n *Node) lookFull() {
	complete := n.complete.Load()
	if complete == nil {
		return
	}
	type image struct {
		id    blockdev.Digest
		diffs []blockdev.Digest
	}
	var images []image
	n.mu.Lock()
	for id, g := range n.groups {
		images = append(images, image{id, g.diffs})
	}
	n.mu.Unlock()
	for _, im := range images {
		full := true
		for _, d := range im.diffs {
			full = full && (*complete)(d)
		}
		n.setFull(im.id, full)
	}
}

func (n *Node) setFull(id blockdev.Digest, full bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	g := n.groups[id]
	if g == nil || g.full == full {
		return
	}
	g.full = full
	if g.home != nil && !g.refused {
		g.home.want(id, true)
	}
}
