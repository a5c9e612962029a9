package members

import (
	"slices"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

const (
	// maxCell is the most members of a cell. A new cell is begun when all of a
	// zone have fullCell; the rest is room for racks to stay together.
	maxCell  = 256
	fullCell = 192
	// smallCell is below how many members a cell is merged into another, if
	// there is one that is not full then.
	smallCell = 48
	// poolSize is from how many members of a cell its gateways are chosen.
	poolSize = 64
)

// seat is a member's place in a group.
type seat struct {
	m      *member
	cell   *cell
	pos    int             // in cell.seats
	synced bool            // the member has what its cell was told last
	full   bool            // the member has all of the image
	origin blockdev.Digest // on whose word it has it (originOf)
}

// message is how the members of the cell are told of the seat's.
func (s *seat) message() *wire.GroupMember {
	if !s.full {
		return s.m.message
	}
	return &wire.GroupMember{Key: s.m.message.Key, Rack: s.m.message.Rack, Addrs: s.m.message.Addrs, Full: true}
}

// cell is a part of a group.
type cell struct {
	id    uint32
	zone  string
	seats []*seat
	racks map[string]int

	// What its members have been told.
	version uint64
	gates   map[uint32][]*seat // of the other cells
	// And what they have not yet.
	joined map[*seat]struct{}
	left   map[wire.Key]struct{}
}

// group is the members of one image's group. It does no I/O and has no clock.
type group struct {
	id      blockdev.Digest
	version uint64
	cells   []*cell // by id
	next    uint32
	size    int
}

func newGroup(id blockdev.Digest) *group { return &group{id: id} }

// add gives m a seat.
func (g *group) add(m *member) *seat {
	c := g.place(m.zone, m.rack)
	s := &seat{m: m}
	g.size++
	c.put(s)
	return s
}

// setFull notes that a member has all of the image now, or not any more.
func (s *seat) setFull(full bool) {
	if s.full != full {
		s.full = full
		s.cell.joined[s] = struct{}{}
	}
}

// place finds the cell for a new member.
func (g *group) place(zone, rack string) *cell {
	var best *cell
	for _, c := range g.cells {
		if c.zone != zone || len(c.seats) >= maxCell {
			continue
		}
		if rack != "" && c.racks[rack] > 0 {
			return c
		}
		if len(c.seats) < fullCell && (best == nil || len(c.seats) > len(best.seats)) {
			best = c
		}
	}
	if best == nil {
		g.next++
		best = &cell{id: g.next, zone: zone, racks: map[string]int{}, gates: map[uint32][]*seat{},
			joined: map[*seat]struct{}{}, left: map[wire.Key]struct{}{}}
		g.cells = append(g.cells, best)
	}
	return best
}

func (c *cell) put(s *seat) {
	s.cell, s.pos, s.synced = c, len(c.seats), false
	c.seats = append(c.seats, s)
	c.racks[s.m.rack]++
	c.joined[s] = struct{}{}
	// What is in joined replaces what members have, so a departure that they
	// were not told of needs no mention.
	delete(c.left, s.m.key)
}

// take removes a seat. The last one gets its position, so that the positions of
// the others, and with them the gateways, stay.
func (c *cell) take(s *seat) {
	last := c.seats[len(c.seats)-1]
	c.seats[s.pos], last.pos = last, s.pos
	c.seats = c.seats[:len(c.seats)-1]
	if c.racks[s.m.rack]--; c.racks[s.m.rack] == 0 {
		delete(c.racks, s.m.rack)
	}
	delete(c.joined, s)
	c.left[s.m.key] = struct{}{}
}

// remove takes a member out of the group.
func (g *group) remove(s *seat) {
	c := s.cell
	c.take(s)
	g.size--
	if len(c.seats) < smallCell {
		g.merge(c)
	}
}

// merge moves what is left of a small cell to another of its zone, if that has
// room, and drops a cell that is empty.
func (g *group) merge(c *cell) {
	for _, other := range g.cells {
		if other != c && other.zone == c.zone && len(other.seats)+len(c.seats) <= fullCell {
			for len(c.seats) > 0 {
				s := c.seats[0]
				c.take(s)
				other.put(s)
			}
			break
		}
	}
	if len(c.seats) == 0 {
		g.cells = slices.DeleteFunc(g.cells, func(x *cell) bool { return x == c })
	}
}

// gateways are the members of c that those of the viewer's cell know. Each cell is
// given others, so that the work is spread; and they stay the same while members
// come, and mostly while they go, so that there is little to tell.
func (c *cell) gateways(viewer *cell) []*seat {
	n := len(c.seats)
	if n <= wire.MaxGateways {
		return slices.Clone(c.seats)
	}
	pool := poolSize
	for pool > n {
		pool /= 2
	}
	windows := pool / wire.MaxGateways
	at := int((viewer.id*0x9e3779b1)>>16) % windows * wire.MaxGateways
	return slices.Clone(c.seats[at : at+wire.MaxGateways])
}

// flush tells members what is new. send queues an encoded message, with its length
// in front, for a member; false: there was no room, so the member gets everything
// at a later flush, and again is true.
func (g *group) flush(send func(*member, []byte) bool) (again bool, err error) {
	g.version++
	for _, c := range g.cells {
		changes := g.gateChanges(c)
		delta := len(c.joined) > 0 || len(c.left) > 0 || len(changes) > 0
		from := c.version
		if delta {
			c.version = g.version
		}
		var whole, diff []byte
		for _, s := range c.seats {
			msg := &whole
			switch {
			case s.m.session == nil:
				s.synced = false
				continue
			case !s.synced:
				if whole == nil {
					if whole, err = g.whole(c); err != nil {
						return again, err
					}
				}
			case !delta:
				continue
			default:
				if msg = &diff; diff == nil {
					if diff, err = g.diff(c, from, changes); err != nil {
						return again, err
					}
				}
			}
			s.synced = send(s.m, *msg)
			again = again || !s.synced
		}
		clear(c.joined)
		clear(c.left)
	}
	return again, nil
}

// gateChanges finds the other cells' gateways that c's members are to be told,
// and notes that they are.
func (g *group) gateChanges(c *cell) map[uint32][]*seat {
	changes := map[uint32][]*seat{}
	for _, other := range g.cells {
		if other == c {
			continue
		}
		now := other.gateways(c)
		if !slices.Equal(now, c.gates[other.id]) {
			changes[other.id] = now
			c.gates[other.id] = now
		}
	}
	for id := range c.gates {
		if !slices.ContainsFunc(g.cells, func(o *cell) bool { return o.id == id }) {
			changes[id] = nil
			delete(c.gates, id)
		}
	}
	return changes
}

func (g *group) update(c *cell, from uint64) *wire.GroupUpdate {
	return &wire.GroupUpdate{Group: g.id[:], Version: c.version, From: from, Cell: c.id, Zone: c.zone}
}

// whole is all that c's members are to know.
func (g *group) whole(c *cell) ([]byte, error) {
	u := g.update(c, 0)
	for _, s := range c.seats {
		u.Joined = append(u.Joined, s.message())
	}
	for _, other := range g.cells {
		if other != c {
			u.Cells = append(u.Cells, gateCell(other.id, other.zone, c.gates[other.id]))
		}
	}
	return encode(u)
}

// diff is what is new since they were told last.
func (g *group) diff(c *cell, from uint64, changes map[uint32][]*seat) ([]byte, error) {
	u := g.update(c, from)
	for s := range c.joined {
		u.Joined = append(u.Joined, s.message())
	}
	for key := range c.left {
		u.Left = append(u.Left, key[:]...)
	}
	for id, gates := range changes {
		zone := ""
		if len(gates) > 0 {
			zone = gates[0].cell.zone
		}
		u.Cells = append(u.Cells, gateCell(id, zone, gates))
	}
	return encode(u)
}

func gateCell(id uint32, zone string, gates []*seat) *wire.GroupCell {
	c := &wire.GroupCell{Cell: id, Zone: zone}
	for _, s := range gates {
		c.Gateways = append(c.Gateways, s.m.message)
	}
	return c
}

func encode(u *wire.GroupUpdate) ([]byte, error) {
	return wire.AppendMessage(nil, &wire.MemberEvent{Part: &wire.MemberEvent_Update{Update: u}})
}
