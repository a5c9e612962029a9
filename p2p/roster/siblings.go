package roster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-multistream"

	"github.com/shoalfs/shoal/blockdev"
)

// revokedProtocol is how supernodes tell each other which nodes were revoked, or allowed again:
// each sends all that it knows, as JSON, and takes what is later.
const revokedProtocol = "/shoal/revoked/1"

const (
	// tellInterval is how often siblings are looked at that have not been told.
	tellInterval = 2 * time.Second
	// tellTimeout bounds an exchange, and maxRevoked what comes in it, in bytes.
	tellTimeout = 10 * time.Second
	maxRevoked  = 16 << 20
)

// siblings are the other supernodes of the datacenter. They and this one tell each other
// which nodes are revoked.
type siblings struct {
	ids     atomic.Pointer[map[peer.ID]bool] // replaced, and never changed
	news    chan struct{}                    // capacity 1: there is something to tell
	revoked *revoked
	cutOff  func(peer.ID) // ends the membership of a node that is revoked now
	log     *slog.Logger

	host   libp2phost.Host // set by start
	ctx    context.Context
	cancel context.CancelFunc
	mu     sync.Mutex // for closed, and that wg grows no more after it is set
	closed bool
	wg     sync.WaitGroup
}

func newSiblings(revoked *revoked, cutOff func(peer.ID), log *slog.Logger) *siblings {
	s := &siblings{news: make(chan struct{}, 1), revoked: revoked, cutOff: cutOff, log: log}
	s.set(nil)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

func (s *siblings) start(h libp2phost.Host) {
	s.host = h
	h.SetStreamHandler(revokedProtocol, s.serve)
	s.wg.Go(s.tellAll)
}

func (s *siblings) close() {
	s.cancel()
	if s.host != nil {
		s.host.RemoveStreamHandler(revokedProtocol)
	}
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *siblings) set(ids []peer.ID) {
	all := map[peer.ID]bool{}
	for _, id := range ids {
		all[id] = true
	}
	s.ids.Store(&all)
}

func (s *siblings) has(id peer.ID) bool { return (*s.ids.Load())[id] }

// told is what a sibling has been told: on which connection, so that one that was
// away is told again, and what.
type told struct {
	conn    string
	version uint64
}

// tellAll exchanges revocations with each sibling: when there are new ones, and when
// it has come back.
func (s *siblings) tellAll() {
	t := time.NewTicker(tellInterval)
	defer t.Stop()
	last := map[peer.ID]told{}
	for {
		for id := range *s.ids.Load() {
			conns := s.host.Network().ConnsToPeer(id)
			if len(conns) == 0 {
				continue
			}
			_, version := s.revoked.all()
			now := told{conns[0].ID(), version}
			if last[id] == now {
				continue
			}
			err := s.tellOne(id)
			switch {
			case err == nil:
				last[id] = now
			case errors.As(err, new(multistream.ErrNotSupported[string])):
				s.log.Warn("a supernode of an older version cannot learn of revoked nodes; revoke them there, too", "supernode", id)
				last[id] = now
			case s.ctx.Err() == nil:
				s.log.Debug("cannot exchange revocations; trying again", "supernode", id, "error", err)
			}
		}
		select {
		case <-s.ctx.Done():
			return
		case <-s.news:
		case <-t.C:
		}
	}
}

func (s *siblings) tellOne(id peer.ID) error {
	ctx, cancel := context.WithTimeout(network.WithNoDial(s.ctx, "told when it is there"), tellTimeout)
	defer cancel()
	st, err := s.host.NewStream(ctx, id, revokedProtocol)
	if err != nil {
		return err
	}
	defer func() { _ = st.Reset() }() // nothing is left to say
	if err := st.SetDeadline(time.Now().Add(tellTimeout)); err != nil {
		return err
	}
	return errors.Join(s.send(st), s.take(st, id))
}

// serve is the other end of tellOne.
func (s *siblings) serve(st network.Stream) {
	id := st.Conn().RemotePeer()
	s.mu.Lock()
	ok := s.has(id) && !s.closed
	if ok {
		s.wg.Add(1)
	}
	s.mu.Unlock()
	if !ok {
		_ = st.Reset()
		return
	}
	defer s.wg.Done()
	stop := context.AfterFunc(s.ctx, func() { _ = st.Reset() })
	defer stop()
	err := st.SetDeadline(time.Now().Add(tellTimeout))
	if err == nil {
		err = s.take(st, id)
	}
	if err == nil {
		err = s.send(st)
	}
	if err != nil {
		s.log.Warn("cannot exchange revocations", "supernode", id, "error", err)
		_ = st.Reset()
		return
	}
	_ = st.Close()
}

func (s *siblings) send(st network.Stream) error {
	all, _ := s.revoked.all()
	if err := json.NewEncoder(st).Encode(all); err != nil {
		return err
	}
	return st.CloseWrite()
}

func (s *siblings) take(st network.Stream, from peer.ID) error {
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
		if s.has(id) || id == s.host.ID() {
			delete(theirs, id) // as Revoke refuses it
		}
	}
	added, err := s.revoked.merge(theirs)
	for _, id := range added {
		if err == nil {
			s.log.Info("a supernode says that a node is revoked", "node", id, "supernode", from)
			s.cutOff(id)
		}
	}
	if len(added) > 0 {
		signal(s.news) // those that it cannot reach
	}
	return err
}
