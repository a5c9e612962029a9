package node

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/cmd/shoal/internal/reload"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/uplink"
)

// supernodeRestart is how long a pull waits for the only supernode after its
// connection was lost: a restart takes less, and an image that was not opened then
// would be unpacked by containerd for good.
const supernodeRestart = 3 * time.Second

// links are a node's connections to its supernodes.
type links struct {
	*uplink.Uplink
	host  libp2phost.Host
	node  *members.Node
	opts  exchange.Options // of each connection
	only  atomic.Bool      // there is one supernode; if not, the next one takes over
	all   daemon.Clients
	infos []peer.AddrInfo
	names atomic.Pointer[[]string] // as in the config
}

func openLinks(c *config.Node, h libp2phost.Host, node *members.Node, opts exchange.Options) (*links, error) {
	infos, err := parseSupernodes(c.Supernodes)
	if err != nil {
		return nil, err
	}
	l := &links{host: h, node: node, opts: opts, infos: infos}
	l.opts.Restart, l.opts.Patient, l.opts.Only = supernodeRestart, true, l.only.Load
	l.only.Store(len(l.infos) == 1)
	l.names.Store(&c.Supernodes)
	if l.all, err = l.all.With(l.infos, l.open); err != nil {
		return nil, err
	}
	if l.Uplink, err = uplink.New(supernodes(l.all)); err != nil {
		return nil, errors.Join(err, l.all.CloseBut(nil))
	}
	return l, nil
}

func (l *links) open(info peer.AddrInfo) (*exchange.Client, error) {
	opts := l.opts
	opts.Ready = func(ctx context.Context) error { return l.node.Ready(ctx, info.ID) }
	return exchange.NewClient(l.host, info, opts)
}

// change has the node use the supernodes that its config names now. With an error of
// opening a connection nothing changes.
func (l *links) change(c *config.Node) error {
	infos, err := parseSupernodes(c.Supernodes)
	if err != nil {
		return err
	}
	// First: this node may connect to its supernodes alone.
	if err := l.node.SetSupernodes(infos); err != nil {
		return err
	}
	now, err := l.all.With(infos, l.open)
	if err != nil {
		return errors.Join(err, l.node.SetSupernodes(l.infos))
	}
	l.only.Store(len(infos) == 1)
	l.names.Store(&c.Supernodes)
	l.all, l.infos = now, infos
	return l.Set(supernodes(now))
}

func parseSupernodes(list []string) (infos []peer.AddrInfo, err error) {
	for _, s := range list {
		info, err := host.ParseAddr(s)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	return infos, nil
}

func supernodes(cs daemon.Clients) map[peer.ID]uplink.Supernode {
	list := make(map[peer.ID]uplink.Supernode, len(cs))
	for id, c := range cs {
		list[id] = c
	}
	return list
}

// reloadSupernodes adds what a node does when its config names other supernodes. Whether it
// has any, and whether one of them is on another machine, is decided at its start.
func reloadSupernodes(r *reload.Reloader[*config.Node], l *links, away bool) {
	r.On(func(c *config.Node) error {
		if len(c.Supernodes) == 0 || elsewhere(c) != away {
			return reload.ErrRestart
		}
		return l.change(c)
	}, "supernodes")
}
