package roster

import (
	"context"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/members"
)

const (
	// joinTime is how long a peer may be connected without having joined.
	joinTime = 10 * time.Second
	// maxStrangers bounds how many such peers there are at a time. Members have
	// their place beside them, so strangers cannot keep members out.
	maxStrangers = 1024
	sweepEvery   = time.Second
)

// cutOff is when a peer that was a member became a stranger: long ago, so that
// the next sweep ends the connection, with streams that were opened before.
var cutOff = time.Time{}

// Connect implements host.Guard. A revoked peer may connect as strangers may, to
// be told so.
func (l *List) Connect(id peer.ID, dir network.Direction) bool {
	if dir == network.DirOutbound || l.siblings.has(id) {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.members[id] != nil {
		return true
	}
	if _, ok := l.strangers[id]; ok {
		return true
	}
	if len(l.strangers) >= maxStrangers {
		l.metrics.strangers.Inc()
		return false
	}
	l.strangers[id] = time.Now()
	return true
}

// Stream implements host.Guard.
func (l *List) Stream(_ context.Context, id peer.ID, proto protocol.ID) error {
	if l.revoked.has(id) {
		if proto == members.Protocol {
			return nil // to be told
		}
		return errRevoked
	}
	if proto == members.Protocol || l.siblings.has(id) {
		return nil
	}
	l.mu.Lock()
	member := l.members[id] != nil
	l.mu.Unlock()
	if member {
		return nil
	}
	l.metrics.strangers.Inc()
	return fmt.Errorf("%s has not joined: %w", id, blockdev.ErrUnauthorized)
}

// sweep disconnects peers that have not joined in time, and looks at the token file.
func (l *List) sweep() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-l.ctx.Done():
			return
		}
		l.reloadTokens()
		l.expireRelays(time.Now())
		for _, id := range l.overdue(time.Now()) {
			if others, say := l.quiet.Say("stranger", string(id), time.Now()); say {
				l.log.Info("disconnecting a peer that has not joined", "peer", id, "others", others)
			}
			l.metrics.strangers.Inc()
			_ = l.host.Network().ClosePeer(id) // gone already is as good
		}
	}
}

// overdue lists the peers that are to be disconnected.
func (l *List) overdue(now time.Time) (ids []peer.ID) {
	connected := l.host.Network().Peers()
	l.mu.Lock()
	defer l.mu.Unlock()
	there := make(map[peer.ID]bool, len(connected))
	for _, id := range connected {
		there[id] = true
		if l.members[id] != nil || l.siblings.has(id) {
			delete(l.strangers, id)
			continue
		}
		since, ok := l.strangers[id]
		switch {
		case !ok:
			l.strangers[id] = now
		case now.Sub(since) > joinTime:
			ids = append(ids, id)
		}
	}
	for id, since := range l.strangers {
		if !there[id] && now.Sub(since) > joinTime/2 { // else its handshake may be under way
			delete(l.strangers, id)
		}
	}
	return ids
}

// reloadTokens reads the token file if it has changed, and ends the sessions of
// those whose token is not in it any more. They stay members for a lease, in which
// they may join with another one.
func (l *List) reloadTokens() {
	changed, err := l.tokens.reload()
	if err != nil {
		l.metrics.tokenErrors.Inc()
		l.log.Error("cannot read the token file", "error", err)
	}
	if !changed {
		return
	}
	l.log.Info("token file read again", "path", l.tokens.path)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range l.members {
		if m.session != nil && !l.tokens.has(m.token) {
			m.session.end(fmt.Errorf("the token that this node has joined with is not in the supernode's token file any more: %w", errToken))
		}
	}
}
