package swarm

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/wire"
)

const (
	// What one peer is asked for at a time. Its limits for one node
	// (NodeLimits) are no less.
	peerDemand, peerStartup, peerPrefetch, peerForwards = 32, 32, 16, 16
	// demandPeer is how long a peer may take for one chunk before its stream is
	// given up, whatever route says; prefetchPeer the same for prefetch.
	demandPeer   = 5 * time.Second
	prefetchPeer = time.Minute
	// dialPeer bounds one attempt to connect, and dialAgain the pause before the next one.
	dialPeer  = 8 * time.Second
	dialAgain = 15 * time.Second
	// signPeer is how long a relay may be silent before it says that it is at work.
	signPeer = 500 * time.Millisecond
)

// pool keeps clients of peers: made when first asked, closed when idle.
type pool struct {
	cfg  *Config
	stop chan struct{}
	wg   sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	clients map[peer.ID]*pooled
}

// pooled is a client in the pool, or out of it and waiting for its last user.
type pooled struct {
	*exchange.Client
	heard atomic.Int64 // when it sent something last, as Swarm.now
	users int
	last  time.Time // when users became 0
}

func newPool(cfg *Config) *pool {
	p := &pool{cfg: cfg, stop: make(chan struct{}), clients: make(map[peer.ID]*pooled)}
	p.wg.Go(p.sweep)
	return p
}

// get returns a client of a peer in one of this node's groups; give it back with put.
func (p *pool) get(id string) (*pooled, error) {
	if c, err := p.open(peer.ID(id)); c != nil || err != nil {
		return c, err
	}
	info, ok := p.cfg.Groups.Addrs(peer.ID(id))
	if !ok {
		return nil, fmt.Errorf("the addresses of peer %s are not known: %w", peer.ID(id), blockdev.ErrUnavailable)
	}
	return p.at(info)
}

// open returns the client that there is of a peer, or nil.
func (p *pool) open(id peer.ID) (*pooled, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.openLocked(id)
}

func (p *pool) openLocked(id peer.ID) (*pooled, error) {
	if p.closed {
		return nil, fmt.Errorf("%w: the node is shutting down", blockdev.ErrUnavailable)
	}
	c := p.clients[id]
	if c != nil {
		c.users++
	}
	return c, nil
}

// at is get for a peer that listens there.
func (p *pool) at(info peer.AddrInfo) (*pooled, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c, err := p.openLocked(info.ID); c != nil || err != nil {
		return c, err
	}
	if len(p.clients) >= p.cfg.MaxPeers && !p.makeRoom() {
		return nil, fmt.Errorf("%d peers are being asked already: %w", len(p.clients), wire.ErrBusy)
	}
	c, err := exchange.NewClient(p.cfg.Host, info, exchange.Options{
		Name: "peer", Intake: p.cfg.Intake,
		Demand: peerDemand, Startup: peerStartup, Prefetch: peerPrefetch, Forwards: peerForwards, Peer: true,
		DemandTimeout: demandPeer, PrefetchTimeout: prefetchPeer, DialTimeout: dialPeer, MaxBackoff: dialAgain, FirstSign: signPeer,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", blockdev.ErrUnavailable, err)
	}
	pc := &pooled{Client: c, users: 1}
	p.clients[info.ID] = pc
	return pc, nil
}

func (p *pool) put(c *pooled) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.users--; c.users == 0 {
		c.last = time.Now()
	}
}

// makeRoom drops the client that has been idle longest; false: none is idle.
func (p *pool) makeRoom() bool {
	var oldest *pooled
	for _, c := range p.clients {
		if c.users == 0 && (oldest == nil || c.last.Before(oldest.last)) {
			oldest = c
		}
	}
	if oldest == nil {
		return false
	}
	p.drop(oldest)
	return true
}

// drop takes a client out and closes it, which waits for a dial under way.
func (p *pool) drop(c *pooled) {
	delete(p.clients, c.Peer())
	p.wg.Go(func() { _ = c.Close() })
}

// sweep drops clients that have been idle for long.
func (p *pool) sweep() {
	t := time.NewTicker(p.cfg.IdlePeer / 4)
	defer t.Stop()
	for {
		select {
		case <-p.stop:
			return
		case now := <-t.C:
			p.mu.Lock()
			for _, c := range p.clients {
				if c.users == 0 && now.Sub(c.last) > p.cfg.IdlePeer {
					p.drop(c)
				}
			}
			p.mu.Unlock()
		}
	}
}

func (p *pool) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.clients)
}

// close ends all requests and closes all clients.
func (p *pool) close() {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		close(p.stop)
		for _, c := range p.clients {
			p.drop(c)
		}
	}
	p.mu.Unlock()
	p.wg.Wait()
}
