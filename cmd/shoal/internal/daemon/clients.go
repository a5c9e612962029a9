package daemon

import (
	"errors"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/shoalfs/shoal/p2p/exchange"
)

// Clients are connections to supernodes, by their IDs.
type Clients map[peer.ID]*exchange.Client

// With returns a client of each of these supernodes: the one that there is, if the addresses
// are the same, or a new one.
func (cs Clients) With(infos []peer.AddrInfo, open func(peer.AddrInfo) (*exchange.Client, error)) (Clients, error) {
	now := Clients{}
	for _, info := range infos {
		c := cs[info.ID]
		if c == nil || !slices.EqualFunc(c.Server().Addrs, info.Addrs, ma.Multiaddr.Equal) {
			var err error
			if c, err = open(info); err != nil {
				return nil, errors.Join(err, now.CloseBut(cs))
			}
		}
		now[info.ID] = c
	}
	return now, nil
}

// CloseBut closes those that are not among others.
func (cs Clients) CloseBut(others Clients) error {
	var errs []error
	for id, c := range cs {
		if others[id] != c {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}
