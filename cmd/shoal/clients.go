package main

import (
	"errors"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/shoalfs/shoal/p2p/exchange"
)

// clients are connections to supernodes, by their IDs.
type clients map[peer.ID]*exchange.Client

// with returns a client of each of these supernodes: the one that there is, if the addresses
// are the same, or a new one.
func (cs clients) with(infos []peer.AddrInfo, open func(peer.AddrInfo) (*exchange.Client, error)) (clients, error) {
	now := clients{}
	for _, info := range infos {
		c := cs[info.ID]
		if c == nil || !slices.EqualFunc(c.Server().Addrs, info.Addrs, ma.Multiaddr.Equal) {
			var err error
			if c, err = open(info); err != nil {
				return nil, errors.Join(err, now.closeBut(cs))
			}
		}
		now[info.ID] = c
	}
	return now, nil
}

// closeBut closes those that are not among others.
func (cs clients) closeBut(others clients) error {
	var errs []error
	for id, c := range cs {
		if others[id] != c {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}
