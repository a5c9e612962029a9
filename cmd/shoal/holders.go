package main

import (
	"context"
	"log/slog"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/roster"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/supernode/layers"
)

// holders finds nodes that have an image, for a supernode that has lost it.
type holders struct {
	host libp2phost.Host
	list *roster.List
	log  *slog.Logger
}

func (h holders) of(manifest blockdev.Digest, origin string, n int) []layers.Holder {
	var out []layers.Holder
	for _, id := range h.list.Holders(manifest, origin, n) {
		// The connection that it has made serves; who loses that is not asked.
		conns := h.host.Network().ConnsToPeer(id)
		if len(conns) == 0 {
			continue
		}
		info := peer.AddrInfo{ID: id, Addrs: []ma.Multiaddr{conns[0].RemoteMultiaddr()}}
		c, err := exchange.NewClient(h.host, info, exchange.Options{Name: "node", Log: h.log})
		if err != nil {
			h.log.Warn("cannot ask a node for an image", "node", id, "error", err)
			continue
		}
		out = append(out, holder{c, manifest})
	}
	return out
}

// holder is one of them.
type holder struct {
	*exchange.Client
	group blockdev.Digest
}

// Fetch implements blockdev.Source. What the node does not have it is not to ask
// others for, and so in the end this supernode.
func (h holder) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	return h.FetchVia(ctx, exchange.Via{Group: h.group, Hops: route.MaxHops}, req, deliver)
}
