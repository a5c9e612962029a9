package exchange

import (
	"bufio"
	"context"
	"fmt"
	"sync"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

// maxIdle is how many streams a lane keeps for later requests.
const maxIdle = 8

// openTimeout bounds the opening of a stream. As a rule that sends nothing and
// takes no time; on a new connection it waits for the handshake's last part.
const openTimeout = 10 * time.Second

// readBuffer is for frame headers; the body of a chunk is larger and is read
// past it.
const readBuffer = 2 << 10

// lane is a client's streams of one kind.
type lane struct {
	host  libp2phost.Host
	peer  peer.ID
	proto protocol.ID
	slots chan struct{} // one for each request under way

	mu     sync.Mutex
	closed bool
	idle   []*stream // longest idle first
	busy   map[*stream]struct{}
}

// stream is one stream of a lane.
type stream struct {
	network.Stream
	r     *bufio.Reader
	out   []byte    // for the request
	since time.Time // idle since
	wait  deadline  // for what the server sends
	send  deadline  // for what it takes
}

func newLane(h libp2phost.Host, p peer.ID, proto protocol.ID, limit int) *lane {
	return &lane{host: h, peer: p, proto: proto, slots: make(chan struct{}, limit), busy: make(map[*stream]struct{})}
}

// enter waits for one of the lane's slots; leave gives it back.
func (l *lane) enter(ctx context.Context) error {
	select {
	case l.slots <- struct{}{}:
		return nil
	default:
	}
	select {
	case l.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return contextError(ctx)
	}
}

// tryEnter takes a slot if one is free.
func (l *lane) tryEnter() error {
	select {
	case l.slots <- struct{}{}:
		return nil
	default:
		return fmt.Errorf("%d requests are under way: %w", cap(l.slots), wire.ErrBusy)
	}
}

func (l *lane) leave() { <-l.slots }

// get returns an idle stream, the last one used, or else a new one; with fresh,
// always a new one.
func (l *lane) get(ctx context.Context, fresh bool) (*stream, error) {
	if !fresh {
		if st := l.pop(); st != nil {
			return st, nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	s, err := l.host.NewStream(network.WithNoDial(ctx, "the keeper dials"), l.peer, l.proto)
	if err != nil {
		return nil, err
	}
	st := &stream{Stream: s, r: bufio.NewReaderSize(s, readBuffer)}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		_ = s.Reset()
		return nil, fmt.Errorf("%w: the client is closed", blockdev.ErrUnavailable)
	}
	l.busy[st] = struct{}{}
	return st, nil
}

func (l *lane) pop() *stream {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := len(l.idle) - 1
	if n < 0 {
		return nil
	}
	st := l.idle[n]
	l.idle[n] = nil
	l.idle = l.idle[:n]
	l.busy[st] = struct{}{}
	return st
}

// put keeps st for the next request. Whatever the server has sent beyond its
// answer is a reason not to.
func (l *lane) put(st *stream, now time.Time) {
	l.mu.Lock()
	delete(l.busy, st)
	keep := !l.closed && len(l.idle) < maxIdle && st.r.Buffered() == 0
	if keep {
		st.since = now
		l.idle = append(l.idle, st)
	}
	l.mu.Unlock()
	if !keep {
		_ = st.Reset()
	}
}

// drop resets st, which is of no more use.
func (l *lane) drop(st *stream) {
	l.mu.Lock()
	delete(l.busy, st)
	l.mu.Unlock()
	_ = st.Reset()
}

// expire closes streams that have been idle since before.
func (l *lane) expire(before time.Time) {
	l.mu.Lock()
	n := 0
	for n < len(l.idle) && l.idle[n].since.Before(before) {
		n++
	}
	old := append([]*stream(nil), l.idle[:n]...)
	l.idle = append(l.idle[:0], l.idle[n:]...)
	l.mu.Unlock()
	for _, st := range old {
		_ = st.Close()
	}
}

// close resets all streams; requests under way fail.
func (l *lane) close() {
	l.mu.Lock()
	l.closed = true
	all := l.idle
	for st := range l.busy {
		all = append(all, st)
	}
	l.idle = nil
	l.mu.Unlock()
	for _, st := range all {
		_ = st.Reset()
	}
}
