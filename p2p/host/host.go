package host

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	libp2pswarm "github.com/libp2p/go-libp2p/p2p/net/swarm"
	tls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// dialTimeout bounds one attempt to connect, handshakes included. Within a
	// datacenter a healthy peer needs milliseconds, but a busy one seconds.
	dialTimeout = 3 * time.Second
	// tcpTimeout bounds the first part of it, to which the other machine's kernel
	// answers, however busy its processes are. No answer: its packets are dropped.
	tcpTimeout = time.Second
)

// Config says what New makes. The zero value of each field but Key is usable.
type Config struct {
	// Key is the identity (LoadIdentity).
	Key crypto.PrivKey
	// Listen are "host:port" addresses, with an IP address or no host for all.
	// Empty: no listening, this host only dials.
	Listen []string
	// MaxPeers is how many peers may be connected at once; 0: DefaultMaxPeers.
	MaxPeers int
	// StreamWindow is how many bytes may be under way to this host on one stream;
	// 0: DefaultStreamWindow. Prefetch from far away is faster with more: two streams
	// carry at most two windows per round trip.
	StreamWindow int
	// Guard, if not nil, decides which peers may connect, and asks for each stream
	// before its handler sees it, for each package's handlers.
	Guard Guard
	// Registerer, if not nil, takes libp2p's own metrics. There are many.
	Registerer prometheus.Registerer
	// UserAgent is what this host calls itself towards others, "shoal/1.2".
	UserAgent string
}

// New makes a host and listens. Close it after use.
func New(c Config) (libp2phost.Host, error) {
	if c.Key == nil {
		return nil, errors.New("p2p host: no identity")
	}
	if c.MaxPeers == 0 {
		c.MaxPeers = DefaultMaxPeers
	}
	if c.MaxPeers < 0 {
		return nil, fmt.Errorf("p2p host: at most %d peers", c.MaxPeers)
	}
	if c.StreamWindow == 0 {
		c.StreamWindow = DefaultStreamWindow
	}
	if c.StreamWindow < minStreamWindow || c.StreamWindow > maxStreamWindow {
		return nil, fmt.Errorf("p2p host: window of %d bytes, not %d to %d", c.StreamWindow, minStreamWindow, maxStreamWindow)
	}
	rm, err := resourceManager(c.MaxPeers, c.StreamWindow, c.Registerer != nil)
	if err != nil {
		return nil, fmt.Errorf("p2p host: resource manager: %w", err)
	}
	cm, err := connManager(c.MaxPeers)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("p2p host: connection manager: %w", err), rm.Close())
	}
	var made atomic.Pointer[libp2phost.Host] // once there is one
	var reach reach
	opts := []libp2p.Option{
		libp2p.Identity(c.Key),
		libp2p.NoListenAddrs, // below, one by one: libp2p is content if any of them works
		libp2p.Transport(tcp.NewTCPTransport, tcp.DisableReuseport(), tcp.WithConnectionTimeout(tcpTimeout)),
		libp2p.Security(tls.ID, tls.New),
		libp2p.Muxer(yamux.ID, muxer(c.StreamWindow)),
		libp2p.ResourceManager(rm),
		libp2p.ConnectionManager(cm),
		libp2p.UserAgent(c.UserAgent),
		libp2p.DisableRelay(),
		libp2p.Ping(false),
		libp2p.DisableIdentifyAddressDiscovery(),
		libp2p.ForceReachabilityPrivate(), // stops AutoNAT's probes
		libp2p.WithDialTimeout(dialTimeout),
		// All addresses of a peer are dialed at once, of both families: there are few,
		// and one whose packets are dropped must not hold up the others.
		libp2p.SwarmOpts(libp2pswarm.WithDialRanker(libp2pswarm.NoDelayDialRanker)),
		libp2p.AddrsFactory(func(addrs []ma.Multiaddr) []ma.Multiaddr {
			if h := made.Load(); h != nil {
				return reach.others(*h, addrs)
			}
			return reach.others(nil, addrs)
		}),
		// These suppress dials to addresses that failed a lot: wrong for a
		// supernode that was down for a while.
		libp2p.UDPBlackHoleSuccessCounter(nil),
		libp2p.IPv6BlackHoleSuccessCounter(nil),
		metrics(c.Registerer),
	}
	if c.Guard != nil {
		opts = append(opts, libp2p.ConnectionGater(gater{c.Guard}))
	}
	h, err := libp2p.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("p2p host: %w", err)
	}
	made.Store(&h)
	for _, addr := range c.Listen {
		if err := Listen(h, addr); err != nil {
			return nil, errors.Join(err, h.Close())
		}
	}
	if c.Guard != nil {
		return &guarded{h, c.Guard}, nil
	}
	return h, nil
}

// Listen has a host listen on a further address, in the form of Config.Listen. It may be
// called again after an error: what could be listened on then still is.
func Listen(h libp2phost.Host, addr string) error {
	must, may, err := listenAddrs(addr)
	if err != nil {
		return fmt.Errorf("p2p host: %w", err)
	}
	listen := func(a ma.Multiaddr) error {
		if ap, ok := addrPort(a); ok && ap.Port() != 0 && slices.ContainsFunc(h.Network().ListenAddresses(), a.Equal) {
			return nil
		}
		if err := h.Network().Listen(a); err != nil {
			return fmt.Errorf("p2p host: listen on %s: %w", a, err)
		}
		return nil
	}
	for _, a := range must {
		if err := listen(a); err != nil {
			return err
		}
	}
	for _, a := range may {
		if err := listen(a); err != nil && !noFamily(err) {
			return err
		}
	}
	return nil
}

// noFamily says whether a machine does not have the address family at all. libp2p does not
// wrap the errors of listening.
func noFamily(err error) bool {
	for _, e := range []error{syscall.EAFNOSUPPORT, syscall.EADDRNOTAVAIL, syscall.EPROTONOSUPPORT} {
		if errors.Is(err, e) || strings.Contains(err.Error(), e.Error()) {
			return true
		}
	}
	return false
}

// ID returns the peer ID of key.
func ID(key crypto.PrivKey) (peer.ID, error) { return peer.IDFromPrivateKey(key) }

// metrics sends libp2p's metrics to reg, or nowhere. Nowhere is a registry that
// is dropped: some parts register with prometheus' global one otherwise, even
// with libp2p.DisableMetrics.
func metrics(reg prometheus.Registerer) libp2p.Option {
	return func(c *libp2p.Config) error {
		c.PrometheusRegisterer, c.DisableMetrics = reg, reg == nil
		if reg == nil {
			c.PrometheusRegisterer = prometheus.NewRegistry()
		}
		return nil
	}
}
