package roster

import (
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/roster/cells"
	"github.com/shoalfs/shoal/p2p/wire"
)

// restoreQuiet is for how long nobody must have come back to a new group before those
// that did learn its members. Nodes try again at least every 2 s after a restart.
const restoreQuiet = 2500 * time.Millisecond

// group is a group with what pushing needs.
type group struct {
	*cells.Group[*place]
	id      blockdev.Digest
	changed bool // there is something to tell
	last    time.Time
	// A group that is new here may have been at another supernode before, or at this one
	// before a restart: its members come back within a moment, and until then those that
	// know more than is here are told nothing.
	restoring   bool
	began, back time.Time // when it was made; when the last one came back
}

// place is what a member has in a group.
type place struct {
	m      *member
	group  *group
	seat   *cells.Seat[*place]
	origin blockdev.Digest // on whose word the member has the image (originOf)
	grant  [16]byte        // digest of the grant that it has shown
	stream int             // in which of the member's sessions it has joined
}

// receiver is where messages for a place go; nil: the member is away, or has come back
// and has not said yet that it is still in the group.
func (p *place) receiver() cells.Receiver {
	if p.m.session == nil || p.stream != p.m.stream {
		return nil
	}
	return p.m.session
}

func receiver(p *place) cells.Receiver { return p.receiver() }

// join makes a member one of a group. If it is one already, it is told everything but
// what it says that it has, unless all it wants to say is that it has the whole image
// now.
func (l *List) join(m *member, j *wire.GroupJoin) error {
	id := blockdev.Digest(j.Group)
	hash := sha256.Sum256(j.Grant)
	short := [16]byte(hash[:])
	origin, known := l.shown(m, id, short)
	if !known {
		var err error
		if origin, err = l.granter.check(j.Grant, m.key, id); err != nil {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.members[m.id] != m {
		return fmt.Errorf("not a member any more: %w", blockdev.ErrUnavailable)
	}
	now := time.Now()
	g, p := l.groups[id], m.groups[id]
	if p != nil {
		if p.stream != m.stream || p.seat.Full() == j.Full {
			g.Ask(p.seat, j.Have)
		}
	} else {
		if len(m.groups) >= wire.MaxGroups || g != nil && g.Size() >= cells.MaxSize {
			return fmt.Errorf("the node is in %d groups, or the group is full: %w", len(m.groups), wire.ErrBusy)
		}
		if g == nil {
			g = &group{Group: cells.New[*place](id), id: id, restoring: true, began: now}
			g.Restore()
			l.groups[id] = g
		}
		p = &place{m: m, group: g}
		p.seat = g.Add(p, m.as, j.Have)
		m.groups[id] = p
		if j.Have != nil {
			g.back = now
		}
		if r := l.relays[relayKey{id, g.Zone(m.zone)}]; r != nil {
			r.add(m)
		}
	}
	p.origin, p.grant, p.stream = origin, short, m.stream
	l.setFullLocked(p, j.Full)
	l.dirtyLocked(g)
	return nil
}

// shown says whether the member has shown this very grant for its place, which was
// found right then: a node that comes back costs no signatures.
func (l *List) shown(m *member, id blockdev.Digest, grant [16]byte) (origin blockdev.Digest, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := m.groups[id]; p != nil && p.grant == grant {
		return p.origin, true
	}
	return origin, false
}

func (l *List) setFullLocked(p *place, full bool) {
	switch {
	case full && !p.seat.Full():
		l.holders++
	case !full && p.seat.Full():
		l.holders--
	}
	p.group.SetFull(p.seat, full)
}

func (l *List) leave(m *member, id blockdev.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.members[m.id] == m {
		l.leaveLocked(m, id)
	}
}

func (l *List) leaveLocked(m *member, id blockdev.Digest) {
	p := m.groups[id]
	if p == nil {
		return
	}
	delete(m.groups, id)
	if p.seat.Full() {
		l.holders--
	}
	p.group.Remove(p.seat)
	if p.group.Size() == 0 {
		delete(l.groups, id)
		delete(l.dirty, p.group)
		return
	}
	l.dirtyLocked(p.group)
}

// common returns the groups that a member shares with the peer of this key,
// joined.
func (l *List) common(m *member, key wire.Key) (joined []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	other := l.members[host.FromKey(key)]
	if other == nil {
		return nil
	}
	for id := range m.groups {
		if other.groups[id] != nil {
			joined = append(joined, id[:]...)
		}
	}
	return joined
}
