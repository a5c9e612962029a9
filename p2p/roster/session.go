package roster

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/roster/cells"
	"github.com/shoalfs/shoal/p2p/wire"
)

// maxQueue bounds what waits to be sent to a member, in bytes.
const maxQueue = 4 << 20

var (
	errRevoked = errors.New("this node has been revoked: `shoal members allow` on the supernode lets it in again")
	errToken   = errors.New("wrong token: the node's token_file must have a line of the supernode's token file")
)

// session is a member's stream, as far as others write to it.
type session struct {
	st     network.Stream
	conn   network.Conn
	wake   chan struct{} // capacity 1
	closed chan struct{} // closed by end

	mu    sync.Mutex
	over  bool
	last  error // to be sent at the end
	queue [][]byte
	bytes int
}

func newSession(st network.Stream) *session {
	return &session{st: st, conn: st.Conn(), wake: make(chan struct{}, 1), closed: make(chan struct{})}
}

// Send queues an encoded message; false: there is no room.
func (s *session) Send(msg []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || s.bytes+len(msg) > maxQueue {
		return false
	}
	s.queue = append(s.queue, msg)
	s.bytes += len(msg)
	signal(s.wake)
	return true
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// event queues a message.
func (s *session) event(ev *wire.MemberEvent) error {
	b, err := wire.AppendMessage(nil, ev)
	if err == nil && !s.Send(b) {
		err = fmt.Errorf("the node does not read: %w", blockdev.ErrUnavailable)
	}
	return err
}

// end ends the session; the node is told why, if err is not nil.
func (s *session) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		s.over, s.last = true, err
		close(s.closed)
	}
}

// write sends what is queued, until the end.
func (s *session) write(lease time.Duration) {
	w := bufio.NewWriterSize(s.st, 16<<10)
	for {
		select {
		case <-s.wake:
		case <-s.closed:
			s.mu.Lock()
			err := s.last
			s.mu.Unlock()
			if err != nil {
				b, encErr := wire.AppendMessage(nil, refusalEvent(err))
				if encErr == nil && s.st.SetWriteDeadline(time.Now().Add(time.Second)) == nil {
					_, _ = s.st.Write(b) // the node finds out anyway
				}
				_ = s.st.CloseWrite()
			}
			// The reader sees the deadline.
			_ = s.st.SetReadDeadline(time.Now())
			return
		}
		s.mu.Lock()
		queue := s.queue
		s.queue, s.bytes = nil, 0
		s.mu.Unlock()
		err := s.st.SetWriteDeadline(time.Now().Add(lease))
		for _, b := range queue {
			if err == nil {
				_, err = w.Write(b)
			}
		}
		if err == nil {
			err = w.Flush()
		}
		if err != nil {
			_ = s.st.SetReadDeadline(time.Now())
			s.end(nil)
			return
		}
	}
}

func refusalEvent(err error) *wire.MemberEvent {
	e := wire.FromError(err)
	if e.Code == wire.Code_CODE_INTERNAL {
		e.Code = wire.Code_CODE_UNAUTHORIZED
	}
	return &wire.MemberEvent{Part: &wire.MemberEvent_Error{Error: e}}
}

// serve is the handler of the membership protocol.
func (l *List) serve(st network.Stream) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		_ = st.Reset()
		return
	}
	l.wg.Add(1)
	l.mu.Unlock()
	defer l.wg.Done()
	stop := context.AfterFunc(l.ctx, func() { _ = st.SetReadDeadline(time.Now()) })
	defer stop()
	r := bufio.NewReaderSize(st, 1<<10)
	m, err := l.hello(st, r)
	if err != nil {
		_ = st.Reset()
		return
	}
	s := newSession(st)
	hello := m
	if m, err = l.add(hello, s); err != nil {
		l.refuse(st, hello, err)
		return
	}
	l.metrics.joins.Inc()
	l.log.Debug("node joined", "node", m.id, "from", hello.remote, "zone", m.zone, "rack", m.rack)
	if err := s.event(l.welcome()); err != nil {
		s.end(nil)
	}
	written := make(chan struct{})
	go func() {
		defer close(written)
		s.write(l.cfg.Lease)
	}()
	heard, bye := l.requests(st, r, m, s)
	l.detach(m, s, bye, l.cfg.Lease-time.Since(heard))
	s.end(nil)
	<-written
	_ = st.Close()
	_ = st.Reset()
}

func (l *List) welcome() *wire.MemberEvent {
	return &wire.MemberEvent{Part: &wire.MemberEvent_Welcome{Welcome: &wire.Welcome{LeaseMs: uint32(l.cfg.Lease.Milliseconds())}}}
}

// hello reads the first request and judges it. An error was told to the peer.
func (l *List) hello(st network.Stream, r *bufio.Reader) (*member, error) {
	if err := st.SetDeadline(time.Now().Add(joinTime)); err != nil {
		return nil, err
	}
	id := st.Conn().RemotePeer()
	m := &member{id: id, joined: time.Now(), groups: map[blockdev.Digest]*place{}, remote: st.Conn().RemoteMultiaddr().String()}
	if na, err := manet.ToNetAddr(st.Conn().RemoteMultiaddr()); err == nil {
		m.remote = na.String()
	}
	b, err := wire.ReadFrame(r, wire.MaxMemberRequest, nil)
	if err != nil {
		return nil, err
	}
	req, err := wire.ParseMemberRequest(b)
	if err == nil && req.GetHello() == nil {
		err = fmt.Errorf("the first request is not a hello: %w", blockdev.ErrCorrupt)
	}
	if err == nil {
		err = l.judge(m, req.GetHello())
	}
	if err != nil {
		l.refuse(st, m, err)
		return nil, err
	}
	return m, nil
}

// judge says whether a peer is let in, and fills in m.
func (l *List) judge(m *member, h *wire.Hello) error {
	var ok bool
	if m.key, ok = host.Key(m.id); !ok {
		return fmt.Errorf("an identity is an Ed25519 key: %w", blockdev.ErrUnsupported)
	}
	if l.revoked.has(m.id) {
		return errRevoked
	}
	l.reloadTokens() // a token that was added a moment ago counts
	if m.token, ok = l.tokens.check(h.Token); !ok {
		return errToken
	}
	m.instance = [wire.InstanceLen]byte(h.Instance)
	m.zone, m.rack, m.upload = h.Zone, h.Rack, h.MaxUpload
	m.as = cells.NewMember(m.zone, &wire.GroupMember{Key: m.key[:], Rack: m.rack, Addrs: dialable(m.remote, h.Addrs)})
	return nil
}

// refuse tells a peer why it is not let in, and an operator which peer it was.
func (l *List) refuse(st network.Stream, m *member, err error) {
	reason := "invalid"
	switch {
	case errors.Is(err, errToken):
		reason = "token"
	case errors.Is(err, errRevoked):
		reason = "revoked"
	case errors.Is(err, errTwice):
		reason = "identity"
	case errors.Is(err, blockdev.ErrUnavailable):
		reason = "limit"
	}
	l.metrics.refused.WithLabelValues(reason).Inc()
	if others, say := l.quiet.Say("not let in: "+reason, string(m.id), time.Now()); say {
		l.log.Warn("node not let in", "node", m.id, "from", m.remote, "error", err, "others", others)
	}
	b, encErr := wire.AppendMessage(nil, refusalEvent(err))
	if encErr == nil && st.SetWriteDeadline(time.Now().Add(time.Second)) == nil {
		if _, err := st.Write(b); err == nil {
			_ = st.CloseWrite()
			// Until the peer has read it: a reset could overtake it.
			_ = st.SetReadDeadline(time.Now().Add(time.Second))
			_, _ = st.Read(make([]byte, 1))
		}
	}
	_ = st.Reset()
}

// requests reads what a member sends, until the lease or the session is over.
func (l *List) requests(st network.Stream, r *bufio.Reader, m *member, s *session) (heard time.Time, bye bool) {
	var buf []byte
	for {
		heard = time.Now()
		if err := st.SetReadDeadline(heard.Add(l.cfg.Lease)); err != nil {
			return heard, false
		}
		select { // what set the deadline to now, to end this, may have come before
		case <-s.closed:
			return heard, false
		case <-l.ctx.Done():
			return heard, false
		default:
		}
		var err error
		if buf, err = wire.ReadFrame(r, wire.MaxMemberRequest, buf); err != nil {
			return heard, false
		}
		req, err := wire.ParseMemberRequest(buf)
		if err != nil {
			s.end(err)
			return heard, false
		}
		switch p := req.Part.(type) {
		case *wire.MemberRequest_Goodbye:
			return heard, true
		case *wire.MemberRequest_Hello:
			s.end(fmt.Errorf("a second hello: %w", blockdev.ErrCorrupt))
			return heard, false
		case *wire.MemberRequest_Renew:
			err = s.event(l.welcome())
		case *wire.MemberRequest_Join:
			err = l.serveJoin(m, s, p.Join)
		case *wire.MemberRequest_Leave:
			l.leave(m, blockdev.Digest(p.Leave.Group))
		case *wire.MemberRequest_Who:
			err = l.serveWho(m, s, p.Who)
		}
		if err != nil {
			s.end(err)
			return heard, false
		}
	}
}

func (l *List) serveJoin(m *member, s *session, j *wire.GroupJoin) error {
	id := blockdev.Digest(j.Group)
	err := l.join(m, j)
	if err == nil {
		return nil
	}
	l.metrics.groupsRefused.Inc()
	if others, say := l.quiet.Say("group", string(m.id), time.Now()); say {
		l.log.Warn("node not let into an image's group", "node", m.id, "manifest", id, "error", err, "others", others)
	}
	return s.event(&wire.MemberEvent{Part: &wire.MemberEvent_Refusal{Refusal: &wire.GroupRefusal{Group: id[:], Error: wire.FromError(err)}}})
}

func (l *List) serveWho(m *member, s *session, w *wire.Who) error {
	for key := range wire.Keys(w.Keys) {
		a := &wire.Answer{Key: key[:], Groups: l.common(m, key)}
		if err := s.event(&wire.MemberEvent{Part: &wire.MemberEvent_Answer{Answer: a}}); err != nil {
			return err
		}
	}
	return nil
}

// maxListed is how many addresses of a member others are told.
const maxListed = 4

// dialable returns the addresses that others are to dial: first the one that the
// node is seen to come from, if it listens there, then the others that it names.
// Link-local addresses mean nothing to others, and loopback ones do only where everybody
// is on this machine, and the node names no others.
func dialable(remote string, listens [][]byte) [][]byte {
	seen, err := netip.ParseAddrPort(remote)
	var named, loop []netip.AddrPort
	for _, b := range listens {
		ap, err := wire.ParseAddr(b)
		switch ip := ap.Addr().Unmap(); {
		case err != nil || ip.IsLinkLocalUnicast():
		case ip.IsLoopback():
			loop = append(loop, ap)
		default:
			named = append(named, ap)
		}
	}
	if len(named) == 0 && err == nil && seen.Addr().Unmap().IsLoopback() {
		named = loop
	}
	var out [][]byte
	add := func(ap netip.AddrPort) {
		b := wire.AppendAddr(nil, ap)
		if len(out) < maxListed && !slices.ContainsFunc(out, func(have []byte) bool { return bytes.Equal(have, b) }) {
			out = append(out, b)
		}
	}
	for _, ap := range named {
		if err == nil && ap.Addr().Unmap() == seen.Addr().Unmap() {
			add(ap)
		}
	}
	for _, ap := range named {
		add(ap)
	}
	return out
}
