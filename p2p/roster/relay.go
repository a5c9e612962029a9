package roster

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/p2p/wire"
)

const (
	// relayDirect is how many members of a zone are given an image's indexes by the
	// supernode in any case, and how many at a time. A node that comes then waits for one of
	// them to have them.
	relayDirect = 4
	// relayChildren is how many others a member passes them on to: with two, all of
	// them go through as many steps as a binary tree has, and no node's link is
	// taken for longer than it takes to send them twice.
	relayChildren = 2
	// maxReady bounds how many of a zone are kept to be named for an image: more than
	// ask at the same time.
	maxReady = 1024
	// relayWait is how long somebody waits for a member to have them.
	relayWait = 2 * time.Second
)

// relayKey is an image in a zone.
type relayKey struct {
	manifest blockdev.Digest
	zone     string
}

// relays says which members give an image's indexes to those of a zone that come next.
// List.mu guards it.
type relays struct {
	ready   []relay               // those that have them, in the order in which they got them
	given   map[peer.ID]time.Time // those that the supernode gives them to, since when
	changed chan struct{}         // closed, and made again, when there is one more in ready
}

// relay is a member that has the indexes, and how many it was named to.
type relay struct {
	m     *member
	named int
}

// Relays returns members of the peer's zone that have been given the image's indexes
// and have not been named to many others yet, the one to ask first in front. None:
// the supernode is to give them. That is so for the first few of a zone; others wait
// for these a while, or for ctx.
func (l *List) Relays(ctx context.Context, id string, manifest blockdev.Digest) []image.Relay {
	p, err := peer.Decode(id)
	if err != nil {
		return nil
	}
	t := time.NewTimer(relayWait)
	defer t.Stop()
	for late := false; ; {
		found, changed := l.relaysFor(p, manifest, late)
		if changed == nil {
			return found
		}
		select {
		case <-changed:
		case <-t.C:
			late = true
		case <-ctx.Done():
			return nil
		}
	}
}

// relaysFor is one look of Relays: changed is not nil if it is worth waiting for. With
// late, it is not.
func (l *List) relaysFor(p peer.ID, manifest blockdev.Digest, late bool) (found []image.Relay, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := l.members[p]
	if m == nil || l.groups[manifest] == nil && !l.isHome(manifest) {
		return nil, nil // a node that has the indexes joins the group elsewhere
	}
	zone := l.groups[manifest].zone(m.zone)
	r := l.relaysLocked(relayKey{manifest, zone})
	now := time.Now()
	r.expire(now)
	if len(r.given)+l.groups[manifest].inZone(zone) >= relayDirect {
		if found = r.take(l, m, manifest); len(found) > 0 {
			return found, nil
		}
	}
	if len(r.given) >= relayDirect && !late {
		return nil, r.changed
	}
	r.given[p] = now
	return nil, nil
}

// isHome says whether nodes that see all supernodes join the image's group here.
func (l *List) isHome(manifest blockdev.Digest) bool {
	all := []peer.ID{l.hostID()}
	for id := range *l.siblings.ids.Load() {
		all = append(all, id)
	}
	return route.Order(manifest, all)[0] == l.hostID()
}

// relaysLocked returns what is known of an image in a zone: to begin with, that the
// members of its group have the indexes.
func (l *List) relaysLocked(key relayKey) *relays {
	r := l.relays[key]
	if r != nil {
		return r
	}
	r = &relays{given: map[peer.ID]time.Time{}, changed: make(chan struct{})}
	l.relays[key] = r
	if g := l.groups[key.manifest]; g != nil {
		for seat := range g.All() {
			if len(r.ready) == maxReady {
				break
			}
			if g.Zone(seat.Member().Zone) == key.zone {
				r.add(seat.Owner.m)
			}
		}
	}
	return r
}

// add notes that a member has the indexes.
func (r *relays) add(m *member) {
	delete(r.given, m.id)
	twice := slices.ContainsFunc(r.ready, func(x relay) bool { return x.m == m })
	if len(m.as.Message().Addrs) > 0 && !twice && len(r.ready) < maxReady {
		r.ready = append(r.ready, relay{m: m})
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// take returns the relays that m may ask: the first that can be asked, and another one in case
// that it does not answer.
func (r *relays) take(l *List, m *member, manifest blockdev.Digest) (found []image.Relay) {
	for len(r.ready) > 0 && l.overLocked(r.ready[0], manifest) { // the others wait for sweep
		r.ready = r.ready[1:]
	}
	ask := func(i int) bool {
		return r.ready[i].m != m && r.ready[i].m.session != nil && !l.overLocked(r.ready[i], manifest)
	}
	for i := range r.ready {
		if ask(i) {
			r.ready[i].named++
			found = append(found, r.ready[i].m.relay())
			break
		}
	}
	if n := len(r.ready); len(found) > 0 {
		if i := rand.IntN(n); ask(i) && r.ready[i].m.key != found[0].Key {
			found = append(found, r.ready[i].m.relay())
		}
	}
	return found
}

// inZone counts the members of a group in a zone; g may be nil.
func (g *group) inZone(zone string) (n int) {
	if g == nil {
		return 0
	}
	return g.InZone(zone)
}

// zone is where a group puts members of a zone; g may be nil.
func (g *group) zone(zone string) string {
	if g == nil {
		return zone
	}
	return g.Zone(zone)
}

// overLocked says whether a relay is not to be named any more.
func (l *List) overLocked(x relay, manifest blockdev.Digest) bool {
	return l.members[x.m.id] != x.m || x.m.groups[manifest] == nil || x.named >= relayChildren
}

// relay is how m is named to another node.
func (m *member) relay() image.Relay {
	r := image.Relay{Key: m.key}
	for _, b := range m.as.Message().Addrs {
		if a, err := wire.ParseAddr(b); err == nil { // dialable has made it
			r.Addrs = append(r.Addrs, a)
		}
	}
	return r
}

// expire forgets members that were given indexes and have not said that they have them.
func (r *relays) expire(now time.Time) {
	for id, at := range r.given {
		if now.Sub(at) > relayWait {
			delete(r.given, id)
		}
	}
}

// expireRelays forgets images that nobody has and nobody is being given. Relays that
// are over are found when they are looked for: they are few, images times members are
// not.
func (l *List) expireRelays(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, r := range l.relays {
		r.expire(now)
		if l.groups[key.manifest].inZone(key.zone) == 0 && len(r.given) == 0 {
			delete(l.relays, key)
		}
	}
}
