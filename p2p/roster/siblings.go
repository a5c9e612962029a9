package roster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multistream"

	"github.com/shoalfs/shoal/blockdev"
)

// revokedProtocol is how supernodes tell each other who was revoked, or allowed again:
// each sends all that it knows, as JSON, and takes what is later.
const revokedProtocol = "/shoal/revoked/1"

const (
	// tellInterval is how often siblings are looked at that have not been told.
	tellInterval = 2 * time.Second
	// tellTimeout bounds an exchange, and maxRevoked what comes in it, in bytes.
	tellTimeout = 10 * time.Second
	maxRevoked  = 16 << 20
)

// SetSiblings changes the list of the other supernodes. Those that are left out may not
// connect any more without joining, and grants that they give do not count.
func (l *List) SetSiblings(ids []peer.ID) error {
	if err := l.granter.trust(ids); err != nil {
		return err
	}
	all := map[peer.ID]bool{}
	for _, id := range ids {
		all[id] = true
	}
	l.siblings.Store(&all)
	return nil
}

func (l *List) isSibling(id peer.ID) bool { return (*l.siblings.Load())[id] }

// told is what a sibling has been told: on which connection, so that one that was
// away is told again, and what.
type told struct {
	conn    string
	version uint64
}

// tellSiblings exchanges revocations with each sibling: when there are new ones, and when
// it has come back.
func (l *List) tellSiblings() {
	t := time.NewTicker(tellInterval)
	defer t.Stop()
	last := map[peer.ID]told{}
	for {
		for id := range *l.siblings.Load() {
			conns := l.host.Network().ConnsToPeer(id)
			if len(conns) == 0 {
				continue
			}
			_, version := l.revoked.all()
			now := told{conns[0].ID(), version}
			if last[id] == now {
				continue
			}
			err := l.tellSibling(id)
			switch {
			case err == nil:
				last[id] = now
			case errors.As(err, new(multistream.ErrNotSupported[string])):
				l.log.Warn("a supernode of an older version cannot learn of revoked nodes; revoke them there, too", "supernode", id)
				last[id] = now
			case l.ctx.Err() == nil:
				l.log.Debug("cannot exchange revocations; trying again", "supernode", id, "error", err)
			}
		}
		select {
		case <-l.ctx.Done():
			return
		case <-l.tell:
		case <-t.C:
		}
	}
}

func (l *List) tellSibling(id peer.ID) error {
	ctx, cancel := context.WithTimeout(network.WithNoDial(l.ctx, "told when it is there"), tellTimeout)
	defer cancel()
	st, err := l.host.NewStream(ctx, id, revokedProtocol)
	if err != nil {
		return err
	}
	defer func() { _ = st.Reset() }() // nothing is left to say
	if err := st.SetDeadline(time.Now().Add(tellTimeout)); err != nil {
		return err
	}
	return errors.Join(l.sendRevoked(st), l.takeRevoked(st, id))
}

// serveRevoked is the other end of tellSibling.
func (l *List) serveRevoked(st network.Stream) {
	id := st.Conn().RemotePeer()
	l.mu.Lock()
	ok := l.isSibling(id) && !l.closed
	if ok {
		l.wg.Add(1)
	}
	l.mu.Unlock()
	if !ok {
		_ = st.Reset()
		return
	}
	defer l.wg.Done()
	stop := context.AfterFunc(l.ctx, func() { _ = st.Reset() })
	defer stop()
	err := st.SetDeadline(time.Now().Add(tellTimeout))
	if err == nil {
		err = l.takeRevoked(st, id)
	}
	if err == nil {
		err = l.sendRevoked(st)
	}
	if err != nil {
		l.log.Warn("cannot exchange revocations", "supernode", id, "error", err)
		_ = st.Reset()
		return
	}
	_ = st.Close()
}

func (l *List) sendRevoked(st network.Stream) error {
	all, _ := l.revoked.all()
	if err := json.NewEncoder(st).Encode(all); err != nil {
		return err
	}
	return st.CloseWrite()
}

func (l *List) takeRevoked(st network.Stream, from peer.ID) error {
	b, err := io.ReadAll(io.LimitReader(st, maxRevoked+1))
	if err != nil {
		return err
	}
	if len(b) > maxRevoked {
		return fmt.Errorf("more than %d bytes of revocations: %w", maxRevoked, blockdev.ErrCorrupt)
	}
	var theirs revocations
	if err := json.Unmarshal(b, &theirs); err != nil {
		return fmt.Errorf("revocations: %w: %w", blockdev.ErrCorrupt, err)
	}
	for id := range theirs {
		if l.isSibling(id) || id == l.hostID() {
			delete(theirs, id) // as Revoke refuses it
		}
	}
	added, err := l.revoked.merge(theirs)
	for _, id := range added {
		if err == nil {
			l.log.Info("a supernode says that a node is revoked", "node", id, "supernode", from)
			l.cutOff(id)
		}
	}
	if len(added) > 0 {
		signal(l.tell) // those that it cannot reach
	}
	return err
}
