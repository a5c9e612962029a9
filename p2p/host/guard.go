package host

import (
	"context"
	"time"

	"github.com/libp2p/go-libp2p/core/control"
	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	ma "github.com/multiformats/go-multiaddr"
)

// Guard decides which peers a host talks to. Its methods are called from many
// goroutines.
type Guard interface {
	// Connect says whether a peer may be connected: before this host dials it,
	// and when a peer that has dialed this host has proven its identity. It
	// does not wait.
	Connect(id peer.ID, dir network.Direction) bool
	// Stream returns nil if the peer may use the protocol, on a stream that the
	// peer has opened. It may wait until it knows; ctx bounds that.
	Stream(ctx context.Context, id peer.ID, proto protocol.ID) error
}

// guardWait bounds how long a stream waits for Guard.Stream.
const guardWait = 3 * time.Second

// guarded is a host all of whose stream handlers ask the guard first. What
// libp2p itself answers (identify) it does not see.
type guarded struct {
	libp2phost.Host
	guard Guard
}

// SetStreamHandler implements host.Host.
func (g *guarded) SetStreamHandler(p protocol.ID, h network.StreamHandler) {
	g.Host.SetStreamHandler(p, g.handler(h))
}

// SetStreamHandlerMatch implements host.Host.
func (g *guarded) SetStreamHandlerMatch(p protocol.ID, match func(protocol.ID) bool, h network.StreamHandler) {
	g.Host.SetStreamHandlerMatch(p, match, g.handler(h))
}

// handler resets streams of peers that may not have them.
func (g *guarded) handler(h network.StreamHandler) network.StreamHandler {
	return func(st network.Stream) {
		ctx, cancel := context.WithTimeout(context.Background(), guardWait)
		err := g.guard.Stream(ctx, st.Conn().RemotePeer(), st.Protocol())
		cancel()
		if err != nil {
			_ = st.Reset()
			return
		}
		h(st)
	}
}

// gater is a Guard as libp2p's swarm asks for it.
type gater struct{ Guard }

// InterceptPeerDial implements connmgr.ConnectionGater.
func (g gater) InterceptPeerDial(id peer.ID) bool { return g.Connect(id, network.DirOutbound) }

// InterceptAddrDial implements connmgr.ConnectionGater.
func (g gater) InterceptAddrDial(peer.ID, ma.Multiaddr) bool { return true }

// InterceptAccept implements connmgr.ConnectionGater. Nothing is known of the
// peer yet; the resource manager bounds how many are in this state.
func (g gater) InterceptAccept(network.ConnMultiaddrs) bool { return true }

// InterceptSecured implements connmgr.ConnectionGater.
func (g gater) InterceptSecured(dir network.Direction, id peer.ID, _ network.ConnMultiaddrs) bool {
	return dir == network.DirOutbound || g.Connect(id, dir)
}

// InterceptUpgraded implements connmgr.ConnectionGater.
func (g gater) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }
