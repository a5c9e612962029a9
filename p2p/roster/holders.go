package roster

import (
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
)

// Holders returns up to n connected members of an image's group that have all of
// it, share what they have, and were given it on the word of origin, a registry's
// host and repository.
func (l *List) Holders(manifest blockdev.Digest, origin string, n int) []peer.ID {
	want := originOf(origin)
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.groups[manifest]
	if g == nil {
		return nil
	}
	var ids []peer.ID
	for seat := range g.All() {
		p := seat.Owner
		switch {
		case !seat.Full(), p.origin != want, len(p.m.as.Message().Addrs) == 0, p.m.session == nil:
		default:
			if ids = append(ids, p.m.id); len(ids) == n {
				return ids
			}
		}
	}
	return ids
}
