package members

import (
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
)

// holdersLocked counts the seats of members that have all of their image.
func (l *List) holdersLocked() (n int) {
	for _, m := range l.members {
		for _, s := range m.groups {
			if s.full {
				n++
			}
		}
	}
	return n
}

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
	for _, c := range g.cells {
		for _, s := range c.seats {
			switch {
			case !s.full, s.origin != want, len(s.m.message.Addrs) == 0, s.m.session == nil:
			default:
				if ids = append(ids, s.m.id); len(ids) == n {
					return ids
				}
			}
		}
	}
	return ids
}
