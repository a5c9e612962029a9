package members

import (
	"errors"
	"fmt"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/shoalfs/shoal/blockdev"
)

// errRemoved is why a session ends whose supernode SetSupernodes has left out.
var errRemoved = fmt.Errorf("not one of this node's supernodes any more: %w", blockdev.ErrUnavailable)

// SetSupernodes changes which supernodes are joined, at least one, after Start. Those that
// are new are joined; to those that are left out this node says goodbye, and their groups
// move to others, with what is known of them. A supernode whose addresses have changed is
// left and joined again. With an error nothing has changed.
func (n *Node) SetSupernodes(infos []peer.AddrInfo) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ctx.Err() != nil {
		return errStopping
	}
	now, err := n.sessionsWith(infos)
	switch {
	case err != nil:
		return err
	case now[n.host.ID()] != nil:
		return ownIdentity(n.host)
	}
	before := n.super
	n.super = now
	for id, s := range before {
		if now[id] != s {
			n.removeLocked(s)
		}
	}
	for id, s := range now {
		if before[id] != s {
			n.wg.Go(s.run)
		}
	}
	return nil
}

// sessionsWith returns a session for each supernode: the one that there is, or a new one.
func (n *Node) sessionsWith(infos []peer.AddrInfo) (map[peer.ID]*session, error) {
	if len(infos) == 0 {
		return nil, errors.New("no supernode")
	}
	all := make(map[peer.ID]*session, len(infos))
	for _, info := range infos {
		if all[info.ID] != nil {
			return nil, fmt.Errorf("supernode %s is named twice", info.ID)
		}
		s := n.super[info.ID]
		if s == nil || !slices.EqualFunc(s.info.Addrs, info.Addrs, ma.Multiaddr.Equal) {
			s = newSession(n, info)
		}
		all[info.ID] = s
	}
	return all, nil
}

// removeLocked ends a session that is not in super any more.
func (n *Node) removeLocked(s *session) {
	s.end(errRemoved)
	n.unansweredLocked(s)
	for _, g := range n.groups {
		if g.home == s {
			g.home = nil
			n.rehomeLocked(g)
		}
	}
}

// left is called when a session has ended for good. A supernode that is removed is
// disconnected, unless there is another session with it.
func (n *Node) left(s *session) {
	if n.ctx.Err() != nil || n.session(s.info.ID) != nil {
		return
	}
	n.log.Info("left the supernode", "peer", s.info.ID)
	_ = n.host.Network().ClosePeer(s.info.ID) // if it is gone already, then that is as good
}

// session returns the one with a supernode; nil: it is none of this node's.
func (n *Node) session(supernode peer.ID) *session {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.super[supernode]
}
