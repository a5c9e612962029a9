package super

import (
	"log/slog"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/supernode/layers"
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
// it goes on without it: a node waits for that long. Earlier versions give one after 5 s.
const siblingSign = 6 * time.Second

// siblings are the other supernodes as a supernode asks them.
type siblings struct {
	open func(peer.AddrInfo) (*exchange.Client, error)
	all  daemon.Clients
}

func newSiblings(h libp2phost.Host, log *slog.Logger) *siblings {
	return &siblings{open: func(info peer.AddrInfo) (*exchange.Client, error) {
		return exchange.NewClient(h, info, exchange.Options{FirstSign: siblingSign, Log: log})
	}}
}

// change makes these the siblings: use is told of them, and those that are left out are
// closed then. With an error of opening one nothing changes.
func (s *siblings) change(infos []peer.AddrInfo, use func(map[peer.ID]layers.Sibling)) error {
	now, err := s.all.With(infos, s.open)
	if err != nil {
		return err
	}
	list := make(map[peer.ID]layers.Sibling, len(now))
	for id, c := range now {
		list[id] = c
	}
	use(list)
	before := s.all
	s.all = now
	return before.CloseBut(now)
}

func (s *siblings) close() error { return s.all.CloseBut(nil) }

// reloadSiblings adds what a supernode does when its config names other siblings.
func (d *Daemon) reloadSiblings(self peer.ID, sibs *siblings) {
	d.reload.On(func(c *config.Supernode) error {
		infos, err := parseSiblings(c.Siblings, self)
		if err != nil {
			return err
		}
		if err := d.list.SetSiblings(peerIDs(infos)); err != nil {
			return err
		}
		return sibs.change(infos, d.super.SetSiblings)
	}, "siblings")
}
