package main

import (
	"errors"
	"log/slog"
	"time"

	libp2p "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/supernode"
)

// parseSiblings reads the addresses of the other supernodes. This one's own is
// left out, so that all of them may have the same list.
func parseSiblings(list []string, self peer.ID) ([]peer.AddrInfo, error) {
	var out []peer.AddrInfo
	for _, s := range list {
		info, err := host.ParseAddr(s)
		if err != nil {
			return nil, err
		}
		if info.ID != self {
			out = append(out, info)
		}
	}
	return out, nil
}

func peerIDs(infos []peer.AddrInfo) []peer.ID {
	var ids []peer.ID
	for _, info := range infos {
		ids = append(ids, info.ID)
	}
	return ids
}

// siblingSign is how long a supernode waits for another one's first sign of life before
// it goes on without it: a node waits meanwhile. Earlier versions give one after 5 s.
const siblingSign = 6 * time.Second

// siblings are connections to the other supernodes.
type siblings map[peer.ID]supernode.Sibling

func openSiblings(h libp2p.Host, infos []peer.AddrInfo, log *slog.Logger) (siblings, error) {
	all := siblings{}
	for _, info := range infos {
		c, err := exchange.NewClient(h, info, exchange.Options{FirstSign: siblingSign, Log: log})
		if err != nil {
			return nil, errors.Join(err, all.close())
		}
		all[info.ID] = c
	}
	return all, nil
}

func (s siblings) close() error {
	var errs []error
	for _, c := range s {
		if c, ok := c.(*exchange.Client); ok {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}
