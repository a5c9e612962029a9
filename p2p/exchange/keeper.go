package exchange

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	libp2pswarm "github.com/libp2p/go-libp2p/p2p/net/swarm"

	"github.com/shoalfs/shoal/blockdev"
)

const (
	// minBackoff is the wait after the first failed dial.
	minBackoff = 50 * time.Millisecond
	// hurried is the longest wait after a failed dial while somebody waits.
	hurried = 250 * time.Millisecond
	// idleStream is how long a stream is kept for the next request. It is well
	// below the server's IdleTimeout.
	idleStream = 30 * time.Second
)

// keeper keeps a connection to one peer. One goroutine dials; everybody else
// asks it for the state.
type keeper struct {
	host   libp2phost.Host
	info   peer.AddrInfo
	opts   *Options
	expire func(before time.Time) // called now and then
	ctx    context.Context        // ends with close
	cancel context.CancelFunc
	look   chan struct{} // capacity 1: the connection may be gone
	wanted chan struct{} // capacity 1: somebody waits for the next attempt
	done   chan struct{} // closed when the goroutine has ended

	mu      sync.Mutex
	up      bool
	since   time.Time     // when it was first not up, since it last was or the keeper was made
	lost    time.Time     // when it was so last; zero: never
	err     error         // why not up, from the last attempt
	dialing chan struct{} // closed at the end of the attempt; nil if there is none
}

func newKeeper(h libp2phost.Host, info peer.AddrInfo, opts Options, expire func(time.Time)) *keeper {
	k := &keeper{
		host: h, info: info, opts: &opts, expire: expire,
		look: make(chan struct{}, 1), wanted: make(chan struct{}, 1), done: make(chan struct{}), dialing: make(chan struct{}),
		since: time.Now(),
	}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	go k.run()
	return k
}

func (k *keeper) close() {
	k.cancel()
	<-k.done
}

// run dials, waits until the connection is lost, and dials again.
func (k *keeper) run() {
	defer close(k.done)
	watch := &network.NotifyBundle{DisconnectedF: func(_ network.Network, c network.Conn) {
		if c.RemotePeer() == k.info.ID {
			k.report()
		}
	}}
	k.host.Network().Notify(watch)
	defer k.host.Network().StopNotify(watch)
	tag := fmt.Sprintf("shoal %p", k) // its own: there may be another client of the same server
	k.host.ConnManager().Protect(k.info.ID, tag)
	defer k.host.ConnManager().Unprotect(k.info.ID, tag)
	defer k.settle(errors.New("the client is closed"))

	backoff := minBackoff
	for {
		err := k.dial()
		k.settle(err)
		if k.ctx.Err() != nil {
			return
		}
		if err != nil {
			if !k.rest(backoff) {
				return
			}
			backoff = min(2*backoff, k.opts.MaxBackoff)
		} else {
			backoff = minBackoff
			k.opts.Log.Info("connected", "to", k.opts.Name, "peer", k.info.ID)
			if !k.watch() {
				return
			}
			k.opts.Log.Warn("connection lost, dialing again", "to", k.opts.Name, "peer", k.info.ID)
		}
		k.begin()
	}
}

// watch returns when the connection is gone; false: the keeper is closed.
func (k *keeper) watch() bool {
	tick := time.NewTicker(idleStream / 2)
	defer tick.Stop()
	for k.connected() {
		select {
		case <-k.look:
			if k.connected() {
				k.recovered()
			}
		case now := <-tick.C:
			k.expire(now.Add(-idleStream))
		case <-k.ctx.Done():
			return false
		}
	}
	return k.ctx.Err() == nil
}

// recovered undoes a report that has looked before the last attempt to dial and told of it
// afterwards: without it nobody would end the wait for another attempt.
func (k *keeper) recovered() {
	k.mu.Lock()
	up := k.up
	k.mu.Unlock()
	if !up {
		k.settle(nil)
	}
}

func (k *keeper) connected() bool {
	return k.host.Network().Connectedness(k.info.ID) == network.Connected
}

// report makes the keeper look whether the connection is still there. If not,
// ready waits for the next attempt from here on.
func (k *keeper) report() {
	connected := k.connected()
	k.mu.Lock()
	if k.up && !connected {
		k.down()
		k.dialing = make(chan struct{})
	}
	k.mu.Unlock()
	select {
	case k.look <- struct{}{}:
	default:
	}
}

func (k *keeper) dial() error {
	ctx, cancel := context.WithTimeout(k.ctx, k.opts.DialTimeout)
	defer cancel()
	// libp2p keeps off a peer for 5 s and more after a failed dial. This
	// keeper has its own back-off.
	if s, ok := k.host.Network().(interface {
		Backoff() *libp2pswarm.DialBackoff
	}); ok {
		s.Backoff().Clear(k.info.ID)
	}
	err := k.host.Connect(ctx, k.info)
	if err != nil && k.ctx.Err() == nil && k.connected() {
		// Connected, but libp2p's exchange of names is slow: a supernode that
		// a thousand nodes dial at once. It goes on by itself.
		return nil
	}
	return err
}

// rest waits between attempts: half to all of the back-off, so that a thousand nodes
// do not dial a restarted supernode in step, and of hurried if somebody waits.
func (k *keeper) rest(backoff time.Duration) bool {
	began, share := time.Now(), 0.5+rand.Float64()/2
	wait := func(d time.Duration) time.Duration { return time.Duration(share * float64(d)) }
	t := time.NewTimer(wait(backoff))
	defer t.Stop()
	for {
		select {
		case <-t.C:
			return true
		case <-k.wanted:
			t.Reset(max(0, wait(min(backoff, hurried))-time.Since(began)))
		case <-k.ctx.Done():
			return false
		}
	}
}

// hurry has the next attempt come soon, and ready wait for it.
func (k *keeper) hurry() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.up || k.ctx.Err() != nil {
		return
	}
	if k.dialing == nil {
		k.dialing = make(chan struct{})
	}
	select {
	case k.wanted <- struct{}{}:
	default:
	}
}

// begin and settle bracket an attempt to dial.
func (k *keeper) begin() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.up {
		k.down()
	}
	if k.dialing == nil {
		k.dialing = make(chan struct{})
	}
}

// down notes that there is no connection any more; mu is held.
func (k *keeper) down() {
	now := time.Now()
	k.up, k.lost, k.since = false, now, now
}

func (k *keeper) settle(err error) {
	k.mu.Lock()
	changed := k.err == nil && err != nil && k.ctx.Err() == nil
	k.up, k.err = err == nil, err
	if k.dialing != nil {
		close(k.dialing)
		k.dialing = nil
	}
	k.mu.Unlock()
	if changed {
		k.opts.Log.Warn("cannot connect, trying again", "to", k.opts.Name, "peer", k.info.ID, "addr", k.info.Addrs, "error", err)
	}
}

// ready returns nil if there is a connection. It waits for an attempt that is
// under way; between attempts it fails at once with the last one's error, and for one
// of many peers (Options.Peer) from the first one that failed on, until another one has
// not.
func (k *keeper) ready(ctx context.Context) error {
	k.mu.Lock()
	up, dialing, failed := k.up, k.dialing, k.err != nil
	k.mu.Unlock()
	if !up && dialing != nil && !(failed && k.opts.Peer) {
		select {
		case <-dialing:
		case <-ctx.Done():
			return contextError(ctx)
		}
	}
	return k.status()
}

// gone returns for how long there has been no connection; 0: there is one.
func (k *keeper) gone() time.Duration {
	k.mu.Lock()
	up, since := k.up, k.since
	k.mu.Unlock()
	if up || k.connected() {
		return 0
	}
	return max(time.Since(since), 1)
}

// lostAt returns when a connection was lost last; zero: never.
func (k *keeper) lostAt() time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.lost
}

func (k *keeper) status() error {
	k.mu.Lock()
	up, err := k.up, k.err
	k.mu.Unlock()
	switch {
	case up, k.ctx.Err() == nil && k.connected(): // perhaps it was the other end that dialed
		return nil
	case err == nil:
		return fmt.Errorf("%w: still connecting to %v", blockdev.ErrUnavailable, k.info.Addrs)
	}
	return fmt.Errorf("%w: cannot connect to %v: %w", blockdev.ErrUnavailable, k.info.Addrs, err)
}
