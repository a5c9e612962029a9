package host

import (
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/libp2p/go-libp2p/x/rate"
)

const (
	// DefaultMaxPeers is how many peers may be connected at once: 1,000 nodes,
	// and room for those that come back under new connections before the old
	// ones are found dead.
	DefaultMaxPeers = 1200

	// connsPerPeer is above 1 because a machine that lost power dials again
	// before its last connection times out here.
	connsPerPeer = 8
	// streamsPerPeer has room for what one node keeps busy: 64 demand reads, a
	// few prefetches and index requests, identify, and the idle ones.
	streamsPerPeer = 160
	// streamsPerPeerMean bounds all peers together. Most are idle at any time.
	streamsPerPeerMean = 32

	// minStreamWindow is the smallest receive window that yamux knows, per stream.
	minStreamWindow = 256 << 10
	maxStreamWindow = 64 << 20
	// DefaultStreamWindow is how much may be under way on one stream. What is under
	// way for prefetches is in front of a demand read on the same connection,
	// so it is no larger than throughput asks for. Measured on a link of
	// 1 Gbit/s, 64 KiB demand reads under prefetch on 2 streams, p50: 3.0 ms
	// with 256 KiB, 8.3 ms with windows that grow to 1 MiB; alone 0.7 ms. On
	// loopback larger windows save no processor time.
	DefaultStreamWindow = minStreamWindow

	// keepAlive is how often an otherwise silent connection is tested, and
	// writeTimeout how long the answer, or a write, may take. Their sum is
	// when a machine that has lost power is given up.
	keepAlive    = 5 * time.Second
	writeTimeout = 10 * time.Second

	// newPeerGrace protects a new connection from the connection manager.
	newPeerGrace = 20 * time.Second
)

func muxer(window int) *yamux.Transport {
	c := *yamux.DefaultTransport.Config() // unbuffered over TLS, streams limited by the resource manager
	c.InitialStreamWindowSize = minStreamWindow
	c.MaxStreamWindowSize = uint32(window)
	c.KeepAliveInterval = keepAlive
	c.ConnectionWriteTimeout = writeTimeout
	return (*yamux.Transport)(&c)
}

// resourceManager limits what peers can make this host hold. libp2p's defaults
// suit machines of strangers all over the internet: about 200 inbound
// connections, 8 at a time and one new every 5 s from one address. Here all
// peers of a rack may come from one address (NAT), and all of them at once after
// a power cut, so limits go by peer, whose identity is proven, and by the total.
func resourceManager(maxPeers, window int, metrics bool) (network.ResourceManager, error) {
	conns := 2 * maxPeers
	streams := maxPeers * streamsPerPeerMean
	// yamux reserves a stream's window whether it is in use or not, so this
	// counts promises; it restates the limit of streams, with some room for
	// windows that grow.
	memory := func(streams int) rcmgr.LimitVal64 {
		return rcmgr.LimitVal64(streams)*minStreamWindow + 64*rcmgr.LimitVal64(window)
	}
	all := rcmgr.ResourceLimits{
		Conns: rcmgr.LimitVal(2 * conns), ConnsInbound: rcmgr.LimitVal(conns), ConnsOutbound: rcmgr.LimitVal(conns),
		FD:      rcmgr.LimitVal(2 * conns),
		Streams: rcmgr.LimitVal(2 * streams), StreamsInbound: rcmgr.LimitVal(streams), StreamsOutbound: rcmgr.LimitVal(streams),
		Memory: memory(2 * streams),
	}
	onePeer := rcmgr.ResourceLimits{
		Conns: 2 * connsPerPeer, ConnsInbound: connsPerPeer, ConnsOutbound: connsPerPeer,
		FD:      2 * connsPerPeer,
		Streams: 2 * streamsPerPeer, StreamsInbound: streamsPerPeer, StreamsOutbound: streamsPerPeer,
		Memory: memory(2 * streamsPerPeer),
	}
	// A connection or stream is transient until its peer, or protocol, is
	// known. All nodes may be in that state at once.
	transient := all
	transient.Conns, transient.ConnsInbound, transient.ConnsOutbound = rcmgr.LimitVal(2*maxPeers), rcmgr.LimitVal(maxPeers), rcmgr.LimitVal(maxPeers)
	transient.FD = transient.Conns
	limits := rcmgr.PartialLimitConfig{
		System:              all,
		Transient:           transient,
		ServiceDefault:      all,
		ServicePeerDefault:  onePeer,
		ProtocolDefault:     all,
		ProtocolPeerDefault: onePeer,
		PeerDefault:         onePeer,
		Conn:                rcmgr.ResourceLimits{Conns: 1, ConnsInbound: 1, ConnsOutbound: 1, FD: 1, Memory: onePeer.Memory},
		Stream:              rcmgr.ResourceLimits{Streams: 1, StreamsInbound: 1, StreamsOutbound: 1, Memory: rcmgr.LimitVal64(minStreamWindow + window)},
	}.Build(rcmgr.InfiniteLimits)
	opts := []rcmgr.Option{
		rcmgr.WithLimitPerSubnet(
			[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 32, ConnCount: conns}},
			[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 56, ConnCount: conns}}),
		rcmgr.WithConnRateLimiters(&rate.Limiter{}), // no limit
	}
	if !metrics {
		opts = append(opts, rcmgr.WithMetricsDisabled())
	}
	return rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(limits), opts...)
}

// connManager closes connections only when there are more than the host is meant
// for, which new peers cannot cause to those that are protected.
func connManager(maxPeers int) (*connmgr.BasicConnMgr, error) {
	return connmgr.NewConnManager(maxPeers, maxPeers+maxPeers/4+1, connmgr.WithGracePeriod(newPeerGrace))
}
