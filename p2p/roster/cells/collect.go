package cells

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/shoalfs/shoal/p2p/wire"
)

// Receiver takes encoded messages for a member, with their length in front. Send does
// not block; false: there is no room.
type Receiver interface {
	Send(msg []byte) bool
}

// Update is what the members of a group are to be told. It shares nothing with the
// group that changes.
type Update[O any] struct {
	id    []byte
	cells []toldCell // all of the group
	news  []change   // whose gateways are others than before
	gone  []uint32
	parts []part[O]

	// Messages and Bytes are what Send has sent.
	Messages, Bytes int
}

// toldCell is a cell as the others are told of it.
type toldCell struct {
	id    uint32
	gates [slots]*gateways
}

type change struct {
	toldCell
	slots uint // bits
}

// part is what the members of one cell are told.
type part[O any] struct {
	cell          uint32
	zone          string
	slot          int
	version, from uint64
	diff, whole   []delivery[O]
	claims        []claim[O]
	joined        []*wire.GroupMember
	left          []byte
	members       []*wire.GroupMember // for whole and claims
	sums          []uint64            // of members, for claims
}

type delivery[O any] struct {
	seat *Seat[O]
	to   Receiver
}

// claim is a delivery to a member that knows something from before.
type claim[O any] struct {
	delivery[O]
	have *wire.GroupHave
}

// Collect takes what is new out of the group. to returns where messages for a member
// go; nil: it is away, and gets everything when it is back.
func (g *Group[O]) Collect(to func(O) Receiver) *Update[O] {
	g.version++
	u := &Update[O]{id: g.id[:], news: g.look(), gone: g.gone}
	g.gone = nil
	all := false // cells are wanted
	for _, c := range g.cells {
		if p, some := g.part(c, u, to); some {
			u.parts = append(u.parts, p)
			all = all || len(p.whole)+len(p.claims) > 0
		}
		clear(c.joined)
		clear(c.left)
	}
	if all {
		for _, c := range g.cells {
			u.cells = append(u.cells, toldCell{c.id, c.gates})
		}
	}
	return u
}

// look brings the gateways of all cells up to date.
func (g *Group[O]) look() (news []change) {
	if few := fewFor(len(g.cells)); few != g.few {
		g.few = few
		for _, c := range g.cells {
			g.touched[c] = struct{}{}
		}
	}
	for c := range g.touched {
		if slots := c.look(g.few); slots != 0 {
			news = append(news, change{toldCell{c.id, c.gates}, slots})
		}
	}
	clear(g.touched)
	return news
}

// part takes what is new for a cell; false: nothing is, for nobody.
func (g *Group[O]) part(c *cell[O], u *Update[O], to func(O) Receiver) (_ part[O], some bool) {
	p := part[O]{cell: c.id, zone: c.zone, slot: c.slot}
	delta := len(c.joined) > 0 || len(c.left) > 0 || len(u.gone) > 0 ||
		slices.ContainsFunc(u.news, func(n change) bool { return n.concerns(c.id, c.slot) })
	p.from = c.version
	if delta {
		c.version = g.version
		p.diff = make([]delivery[O], 0, len(c.seats))
	}
	p.version = c.version
	for _, s := range c.seats {
		r := to(s.Owner)
		switch {
		case r == nil:
			s.synced = false
			continue
		case s.synced && delta:
			p.diff = append(p.diff, delivery[O]{s, r})
		case s.synced || s.have != nil && g.restoring:
			continue
		case s.have != nil:
			p.claims = append(p.claims, claim[O]{delivery[O]{s, r}, s.have})
		default:
			p.whole = append(p.whole, delivery[O]{s, r})
		}
		s.synced, s.have = true, nil
	}
	if len(p.diff) > 0 {
		for s := range c.joined {
			p.joined = append(p.joined, s.message())
		}
		for key := range c.left {
			p.left = append(p.left, key[:]...)
		}
	}
	if len(p.whole)+len(p.claims) > 0 {
		p.members = make([]*wire.GroupMember, len(c.seats))
		for i, s := range c.seats {
			p.members[i] = s.message()
		}
	}
	if len(p.claims) > 0 {
		p.sums = make([]uint64, len(c.seats))
		for i, s := range c.seats {
			p.sums[i] = s.sum()
		}
	}
	return p, len(p.diff)+len(p.whole)+len(p.claims) > 0
}

// concerns says whether those of a cell are to be told of the change.
func (n change) concerns(cell uint32, slot int) bool { return n.id != cell && n.slots>>slot&1 == 1 }

// Failed has those that Send could not tell told everything at the next Collect.
func (g *Group[O]) Failed(seats []*Seat[O]) {
	for _, s := range seats {
		s.synced = false
	}
}

// Send encodes messages, each once for a cell, and sends them. It returns the members that were not
// sent to because there was no room. An error is a message that cannot be sent to
// anybody; the others are still sent.
func (u *Update[O]) Send() (failed []*Seat[O], err error) {
	for i := range u.parts {
		p := &u.parts[i]
		for _, kind := range []struct {
			to   []delivery[O]
			make func(*part[O]) message
		}{{p.diff, u.diff}, {p.whole, u.whole}} {
			if len(kind.to) == 0 {
				continue
			}
			msg, encErr := encode(kind.make(p))
			if encErr != nil {
				err = encErr
				continue
			}
			for _, d := range kind.to {
				failed = u.deliver(failed, d, msg)
			}
		}
		if len(p.claims) == 0 {
			continue
		}
		own := wire.ListSum(p.sums)
		answers := map[string][]byte{} // most have the same
		for _, c := range p.claims {
			key := haveKey(c.have)
			msg, ok := answers[key]
			if !ok {
				var encErr error
				if msg, encErr = encode(u.since(p, own, c.have)); encErr != nil {
					err = encErr
					continue
				}
				answers[key] = msg
			}
			failed = u.deliver(failed, c.delivery, msg)
		}
	}
	return failed, err
}

func (u *Update[O]) deliver(failed []*Seat[O], d delivery[O], msg []byte) []*Seat[O] {
	if !d.to.Send(msg) {
		return append(failed, d.seat)
	}
	u.Messages++
	u.Bytes += len(msg)
	return failed
}

// message is an update, with cells that are encoded.
type message struct {
	*wire.GroupUpdate
	cells [][]byte
}

func (u *Update[O]) update(p *part[O], from uint64) message {
	return message{GroupUpdate: &wire.GroupUpdate{Group: u.id, Version: p.version, From: from, Cell: p.cell, Zone: p.zone}}
}

// whole is all that a cell's members are to know.
func (u *Update[O]) whole(p *part[O]) message {
	m := u.update(p, 0)
	m.Joined = p.members
	for _, c := range u.cells {
		if c.id != p.cell {
			m.cells = append(m.cells, c.gates[p.slot].encoded)
		}
	}
	return m
}

// diff is what is new since they were told last.
func (u *Update[O]) diff(p *part[O]) message {
	m := u.update(p, p.from)
	m.Joined, m.Left = p.joined, p.left
	for _, n := range u.news {
		if n.concerns(p.cell, p.slot) {
			m.cells = append(m.cells, n.gates[p.slot].encoded)
		}
	}
	for _, id := range u.gone {
		m.Cells = append(m.Cells, &wire.GroupCell{Cell: id})
	}
	return m
}

// since is what is not so any more of what a member has; own is the sum of its cell.
func (u *Update[O]) since(p *part[O], own uint64, have *wire.GroupHave) message {
	if have.Cell != p.cell {
		return u.whole(p) // all gateways may be others
	}
	m := u.update(p, 0)
	m.KeepCells, m.KeepMembers = true, have.Members == own
	if !m.KeepMembers {
		m.Joined = p.members
	}
	has := make(map[uint32]uint64, len(have.Cells))
	for i, id := range have.Cells {
		has[id] = have.Gateways[i]
	}
	for _, c := range u.cells {
		if c.id == p.cell {
			continue
		}
		if sum, ok := has[c.id]; !ok || sum != c.gates[p.slot].sum {
			m.cells = append(m.cells, c.gates[p.slot].encoded)
		}
		delete(has, c.id)
	}
	for id := range has {
		m.Cells = append(m.Cells, &wire.GroupCell{Cell: id})
	}
	return m
}

// haveKey is what have says, to find others that say the same.
func haveKey(have *wire.GroupHave) string {
	b := make([]byte, 0, 16+12*len(have.Cells))
	b = binary.BigEndian.AppendUint32(b, have.Cell)
	b = binary.BigEndian.AppendUint64(b, have.Members)
	for i, id := range have.Cells {
		b = binary.BigEndian.AppendUint32(b, id)
		b = binary.BigEndian.AppendUint64(b, have.Gateways[i])
	}
	return string(b)
}

func encode(m message) ([]byte, error) {
	b, err := wire.AppendUpdate(nil, m.GroupUpdate, m.cells)
	if err == nil && len(b) > wire.MaxMemberEvent {
		err = fmt.Errorf("update of %d bytes for cell %d, at most %d are taken", len(b), m.Cell, wire.MaxMemberEvent)
	}
	return b, err
}
