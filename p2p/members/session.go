package members

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	libp2pswarm "github.com/libp2p/go-libp2p/p2p/net/swarm"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/wire"
)

const (
	// joinTimeout bounds an attempt to join, from the dial to the answer.
	joinTimeout = 10 * time.Second
	// minBackoff and maxBackoff are the waits between attempts; after a refusal
	// refusedBackoff, since somebody has to change a file first.
	minBackoff     = 50 * time.Millisecond
	maxBackoff     = 2 * time.Second
	refusedBackoff = 5 * time.Second
	// goodbyeTimeout bounds the last message at Close.
	goodbyeTimeout = time.Second
)

// refusal is a supernode's no.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

// noToken is an attempt for which this node had no token to show. It says nothing
// of what a supernode would say: a token file may be there again in a moment.
type noToken struct{ error }

func (e noToken) Unwrap() error { return e.error }

// toldNo is a supernode's error: a refusal, unless it says that it cannot answer now, as
// one does that is about to restart. That changes nothing about membership.
func toldNo(err error) error {
	if errors.Is(err, blockdev.ErrUnavailable) {
		return err
	}
	return refusal{err}
}

// session is the membership with one supernode.
type session struct {
	n    *Node
	info peer.AddrInfo
	ctx  context.Context // ends with end, or with the node
	end  context.CancelCauseFunc
	poke chan struct{} // capacity 1: try now
	wake chan struct{} // capacity 1: there is something to send

	mu     sync.Mutex
	joined network.Conn  // the connection on which this node is a member; nil: it is not
	err    error         // of the last attempt, nil before its end
	trying chan struct{} // closed at the end of the attempt; nil: none is under way
	// told are the addresses that the supernode was told when this node joined; not under
	// mu: join and write take turns.
	told   []netip.AddrPort
	stream int // how many streams there were; Node.mu guards it
	groups map[blockdev.Digest]bool
	who    []wire.Key
}

func newSession(n *Node, info peer.AddrInfo) *session {
	s := &session{n: n, info: info, poke: make(chan struct{}, 1), wake: make(chan struct{}, 1), trying: make(chan struct{}),
		groups: map[blockdev.Digest]bool{}}
	s.ctx, s.end = context.WithCancelCause(n.ctx)
	return s
}

var errStopping = fmt.Errorf("this node is stopping: %w", blockdev.ErrUnavailable)

// ended says why the session's context has ended.
func (s *session) ended() error {
	if s.n.ctx.Err() != nil {
		return errStopping
	}
	return context.Cause(s.ctx)
}

// run joins, stays joined for as long as that goes, and joins again.
func (s *session) run() {
	n := s.n
	watch := &network.NotifyBundle{ConnectedF: func(_ network.Network, c network.Conn) {
		if c.RemotePeer() == s.info.ID {
			signal(s.poke) // whichever side dialed: joining must not wait
		}
	}}
	n.host.Network().Notify(watch)
	defer n.host.Network().StopNotify(watch)
	tag := fmt.Sprintf("supernode %p", s) // its own: another session with it may have begun
	n.host.ConnManager().Protect(s.info.ID, tag)
	defer n.host.ConnManager().Unprotect(s.info.ID, tag)
	backoff := minBackoff
	for {
		st, r, lease, err := s.join()
		if err == nil {
			backoff = minBackoff
			err = s.stay(st, r, lease)
			s.settle(nil, err)
			n.lost(s)
		}
		if s.ctx.Err() != nil {
			s.settle(nil, s.ended())
			n.left(s)
			return
		}
		s.settle(nil, err)
		wait, poke := backoff/2+rand.N(backoff/2+1), s.poke
		if refused := (refusal{}); errors.As(err, &refused) {
			wait, poke = refusedBackoff, nil
			n.refused(s)
		}
		backoff = min(2*backoff, maxBackoff)
		select {
		case <-time.After(wait):
		case <-poke:
		case <-s.ctx.Done():
		}
		s.mu.Lock()
		s.trying = make(chan struct{})
		s.mu.Unlock()
	}
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// settle ends an attempt: conn is where this node is a member now, or err says
// why it is not.
func (s *session) settle(conn network.Conn, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && s.ctx.Err() == nil && (s.err == nil || s.err.Error() != err.Error()) {
		s.n.log.Warn("not a member of the supernode, trying again", "peer", s.info.ID, "error", err)
	}
	s.joined, s.err = conn, err
	if s.trying != nil {
		close(s.trying)
		s.trying = nil
	}
}

// ready is Node.Ready.
func (s *session) ready(ctx context.Context) error {
	for {
		s.mu.Lock()
		conn, trying, err := s.joined, s.trying, s.err
		s.mu.Unlock()
		if conn != nil && !conn.IsClosed() {
			return nil
		}
		refused := refusal{}
		switch {
		case trying == nil && errors.As(err, &refused):
			return fmt.Errorf("%w: %w", blockdev.ErrUnavailable, refused.error)
		case trying == nil && errors.As(err, new(noToken)):
			return fmt.Errorf("%w: %w", blockdev.ErrUnavailable, err)
		case trying == nil && err != nil && s.n.host.Network().Connectedness(s.info.ID) != network.Connected:
			return fmt.Errorf("%w: %w", blockdev.ErrUnavailable, err)
		case trying == nil:
			// Connected, and not joined yet on that connection.
			signal(s.poke)
			trying = s.next()
		}
		select {
		case <-trying:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.ctx.Done():
			return s.ended()
		}
	}
}

// next returns a channel that is closed at the end of the attempt that is under
// way, or after a moment if there is none.
func (s *session) next() chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.trying != nil {
		return s.trying
	}
	ch := make(chan struct{})
	time.AfterFunc(minBackoff, func() { close(ch) })
	return ch
}

// join makes an attempt.
func (s *session) join() (_ network.Stream, _ *bufio.Reader, lease time.Duration, err error) {
	ctx, cancel := context.WithTimeout(s.ctx, joinTimeout)
	defer cancel()
	h := s.n.host
	// libp2p keeps off a peer for 5 s and more after a failed dial; there is a
	// back-off here.
	if nw, ok := h.Network().(interface {
		Backoff() *libp2pswarm.DialBackoff
	}); ok {
		nw.Backoff().Clear(s.info.ID)
	}
	if err := h.Connect(ctx, s.info); err != nil && h.Network().Connectedness(s.info.ID) != network.Connected {
		return nil, nil, 0, fmt.Errorf("cannot connect to %v: %w", s.info.Addrs, err)
	}
	token, err := s.n.cfg.Token()
	if err != nil {
		return nil, nil, 0, noToken{fmt.Errorf("this node has no token to join with: %w", err)}
	}
	st, err := h.NewStream(network.WithNoDial(ctx, "connected before"), s.info.ID, Protocol)
	if err != nil {
		return nil, nil, 0, fmt.Errorf("join: %w", err)
	}
	defer func() {
		if err != nil {
			_ = st.Reset()
		}
	}()
	deadline, _ := ctx.Deadline()
	if err := st.SetDeadline(deadline); err != nil {
		return nil, nil, 0, err
	}
	s.told = s.n.announced(st.Conn())
	hello := &wire.Hello{Token: token, Instance: s.n.instance[:], Zone: s.n.cfg.Zone, Rack: s.n.cfg.Rack,
		MaxUpload: uint64(s.n.cfg.MaxUpload), Addrs: encode(s.told)}
	if err := write(st, &wire.MemberRequest{Part: &wire.MemberRequest_Hello{Hello: hello}}); err != nil {
		return nil, nil, 0, fmt.Errorf("join: %w", err)
	}
	r := bufio.NewReader(st)
	ev, err := read(r)
	if err != nil {
		return nil, nil, 0, fmt.Errorf("join: %w", err)
	}
	switch p := ev.Part.(type) {
	case *wire.MemberEvent_Welcome:
		return st, r, time.Duration(p.Welcome.LeaseMs) * time.Millisecond, nil
	case *wire.MemberEvent_Error:
		return nil, nil, 0, toldNo(p.Error.Err())
	}
	return nil, nil, 0, fmt.Errorf("join: the supernode did not answer with a welcome: %w", blockdev.ErrCorrupt)
}

// stay is a member until the stream ends. Both ends say something within each
// lease.
func (s *session) stay(st network.Stream, r *bufio.Reader, lease time.Duration) error {
	s.mu.Lock()
	clear(s.groups)
	s.who = nil
	s.mu.Unlock()
	s.settle(st.Conn(), nil)
	s.n.log.Info("joined the supernode", "peer", s.info.ID, "lease", lease)
	s.n.arrived(s)

	done := make(chan struct{})
	written := make(chan struct{})
	go func() {
		defer close(written)
		s.write(st, lease, done)
	}()
	err := s.read(st, r, lease)
	close(done)
	if s.ctx.Err() == nil {
		_ = st.Reset()
	}
	<-written
	_ = st.Reset()
	return err
}

// read takes what the supernode sends.
func (s *session) read(st network.Stream, r *bufio.Reader, lease time.Duration) error {
	stop := context.AfterFunc(s.ctx, func() { _ = st.SetReadDeadline(time.Now()) })
	defer stop()
	for {
		if err := st.SetReadDeadline(time.Now().Add(lease)); err != nil {
			return err
		}
		if err := s.ctx.Err(); err != nil {
			return err
		}
		ev, err := read(r)
		if err != nil {
			return fmt.Errorf("the stream broke: %w", err)
		}
		switch p := ev.Part.(type) {
		case *wire.MemberEvent_Error:
			return toldNo(p.Error.Err())
		case *wire.MemberEvent_Update:
			if err := s.n.update(s, p.Update); err != nil {
				s.n.log.Warn("cannot apply an update of a group; asking for the whole group", "peer", s.info.ID, "error", err)
				s.want(blockdev.Digest(p.Update.Group), true)
			}
		case *wire.MemberEvent_Refusal:
			s.n.groupRefused(s, blockdev.Digest(p.Refusal.Group), p.Refusal.Error.Err())
		case *wire.MemberEvent_Answer:
			s.n.answer(s, p.Answer)
		}
	}
}

// write sends what want and ask have left, and renews the lease.
func (s *session) write(st network.Stream, lease time.Duration, done <-chan struct{}) {
	tick := time.NewTicker(lease / 3)
	defer tick.Stop()
	send := func(m *wire.MemberRequest) bool {
		err := st.SetWriteDeadline(time.Now().Add(lease))
		if err == nil {
			err = write(st, m)
		}
		if err != nil {
			_ = st.Reset() // read finds out
		}
		return err == nil
	}
	for {
		select {
		case <-done:
			if s.ctx.Err() != nil {
				_ = st.SetWriteDeadline(time.Now().Add(goodbyeTimeout))
				_ = write(st, &wire.MemberRequest{Part: &wire.MemberRequest_Goodbye{Goodbye: &wire.Goodbye{}}})
				_ = st.CloseWrite()
				// Until the supernode has read it: a reset could overtake it, and others
				// would ask this node until its lease is over.
				_ = st.SetReadDeadline(time.Now().Add(goodbyeTimeout))
				_, _ = io.Copy(io.Discard, st)
			}
			return
		case <-tick.C:
			if now := s.n.announced(st.Conn()); !slices.Equal(now, s.told) {
				s.n.log.Info("this node's addresses have changed; joining again, so that other nodes learn them", "peer", s.info.ID, "addrs", now, "before", s.told)
				_ = st.Reset()
				return
			}
			if !send(&wire.MemberRequest{Part: &wire.MemberRequest_Renew{Renew: &wire.Renew{}}}) {
				return
			}
		case <-s.wake:
			for _, m := range s.pending() {
				if !send(m) {
					return
				}
			}
		}
	}
}

// want makes the writer join, or leave, a group.
func (s *session) want(group blockdev.Digest, in bool) {
	s.mu.Lock()
	s.groups[group] = in
	s.mu.Unlock()
	signal(s.wake)
}

// ask makes the writer ask about a peer.
func (s *session) ask(key wire.Key) {
	s.mu.Lock()
	s.who = append(s.who, key)
	s.mu.Unlock()
	signal(s.wake)
}

// pending returns what is to be sent now.
func (s *session) pending() []*wire.MemberRequest {
	s.mu.Lock()
	groups, who := s.groups, s.who
	s.groups, s.who = map[blockdev.Digest]bool{}, nil
	s.mu.Unlock()
	var out []*wire.MemberRequest
	for id, in := range groups {
		m := &wire.MemberRequest{Part: &wire.MemberRequest_Leave{Leave: &wire.GroupLeave{Group: id[:]}}}
		if in {
			join := s.n.joinMessage(s, id)
			if join == nil {
				continue // left, or moved, since
			}
			m.Part = &wire.MemberRequest_Join{Join: join}
		}
		out = append(out, m)
	}
	for len(who) > 0 {
		k := min(len(who), wire.MaxWho)
		var keys []byte
		for _, key := range who[:k] {
			keys = append(keys, key[:]...)
		}
		who = who[k:]
		out = append(out, &wire.MemberRequest{Part: &wire.MemberRequest_Who{Who: &wire.Who{Keys: keys}}})
	}
	return out
}

func write(st network.Stream, m *wire.MemberRequest) error {
	b, err := wire.AppendMessage(nil, m)
	if err != nil {
		return err
	}
	_, err = st.Write(b)
	return err
}

func read(r *bufio.Reader) (*wire.MemberEvent, error) {
	b, err := wire.ReadFrame(r, wire.MaxMemberEvent, nil)
	if err != nil {
		return nil, err
	}
	return wire.ParseMemberEvent(b)
}

// announced returns where others are told to dial this node: as the config says, or at the
// interface over which this connection to a supernode goes. It depends on nothing that
// changes by itself.
func (n *Node) announced(to network.Conn) []netip.AddrPort {
	addrs := n.cfg.Announce
	if len(addrs) == 0 {
		addrs = host.Toward(n.host, to.LocalMultiaddr())
	}
	return addrs[:min(len(addrs), wire.MaxAddrs)]
}

// encode returns addresses as they are sent.
func encode(addrs []netip.AddrPort) [][]byte {
	out := make([][]byte, len(addrs))
	for i, ap := range addrs {
		out[i] = wire.AppendAddr(nil, ap)
	}
	return out
}
