package super

import (
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/supernode/layers"
)

// holders finds nodes that have an image, for a supernode that has lost it.
func (d *Daemon) holders(manifest blockdev.Digest, origin string, n int) []layers.Holder {
	var out []layers.Holder
	// A node is not to ask others for what it does not have, and so after all this
	// supernode.
	via := exchange.Via{Group: manifest, Hops: route.MaxHops}
	for _, id := range d.list.Holders(manifest, origin, n) {
		// The connection that it has made serves; a node that loses that is not asked.
		conns := d.host.Network().ConnsToPeer(id)
		if len(conns) == 0 {
			continue
		}
		info := peer.AddrInfo{ID: id, Addrs: []ma.Multiaddr{conns[0].RemoteMultiaddr()}}
		c, err := exchange.NewClient(d.host, info, exchange.Options{Name: "node", Via: via, Log: d.log})
		if err != nil {
			d.log.Warn("cannot ask a node for an image", "node", id, "error", err)
			continue
		}
		out = append(out, c)
	}
	return out
}
