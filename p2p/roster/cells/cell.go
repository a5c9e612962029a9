package cells

import (
	"cmp"
	"slices"

	"github.com/shoalfs/shoal/p2p/wire"
)

const (
	// slots is how many different sets of gateways a cell has: cells are told one or
	// the other, by their own IDs, so that the work is spread.
	slots = 8
	// manyGateways is how many gateways there may be in a list, all cells together: at
	// the most 185 bytes each, a third of a message.
	manyGateways = 2048
)

// cell is a part of a group.
type cell[O any] struct {
	id    uint32
	zone  string
	slot  int
	seats []*Seat[O]
	ring  []*Seat[O] // the same, by point
	racks map[string]int

	version uint64                // of what its members have been told
	gates   [slots]*gateways      // that members of other cells have been told; nil: none yet
	joined  map[*Seat[O]]struct{} // that its members have not been told yet
	left    map[wire.Key]struct{} // nor these
}

// gateways is what those of one slot are told of a cell. It does not change.
type gateways struct {
	members []*wire.GroupMember
	encoded []byte // by wire.AppendCell
	sum     uint64
}

func (g *Group[O]) newCell(id uint32, zone string) *cell[O] {
	c := &cell[O]{id: id, zone: zone, slot: int(id*0x9e3779b1>>16) % slots, racks: map[string]int{},
		joined: map[*Seat[O]]struct{}{}, left: map[wire.Key]struct{}{}}
	g.next = max(g.next, id)
	g.cells = append(g.cells, c)
	g.byID[id] = c
	return c
}

func (g *Group[O]) put(c *cell[O], s *Seat[O]) {
	s.cell, s.pos, s.synced = c, len(c.seats), false
	c.seats = append(c.seats, s)
	i, _ := slices.BinarySearchFunc(c.ring, s, byPoint)
	c.ring = slices.Insert(c.ring, i, s)
	c.racks[s.member.Rack]++
	c.joined[s] = struct{}{}
	// What is in joined replaces what members have, so a departure that they
	// were not told of needs no mention.
	delete(c.left, s.member.key)
	g.touched[c] = struct{}{}
}

func (g *Group[O]) take(c *cell[O], s *Seat[O]) {
	last := c.seats[len(c.seats)-1]
	c.seats[s.pos], last.pos = last, s.pos
	c.seats[len(c.seats)-1] = nil
	c.seats = c.seats[:len(c.seats)-1]
	if i, ok := slices.BinarySearchFunc(c.ring, s, byPoint); ok {
		c.ring = slices.Delete(c.ring, i, i+1)
	}
	if c.racks[s.member.Rack]--; c.racks[s.member.Rack] == 0 {
		delete(c.racks, s.member.Rack)
	}
	delete(c.joined, s)
	c.left[s.member.key] = struct{}{}
	g.touched[c] = struct{}{}
}

// byPoint compares by point, which is the key's beginning, and then by the rest of it.
func byPoint[O any](a, b *Seat[O]) int {
	if c := cmp.Compare(a.point, b.point); c != 0 {
		return c
	}
	return slices.Compare(a.member.key[:], b.member.key[:])
}

// merge moves what is left of a small cell to another of its zone, if that has
// room, and drops a cell that is empty.
func (g *Group[O]) merge(c *cell[O]) {
	for _, other := range g.cells {
		if other != c && other.zone == c.zone && len(other.seats)+len(c.seats) <= fullCell {
			for len(c.seats) > 0 {
				s := c.seats[0]
				g.take(c, s)
				g.put(other, s)
			}
			break
		}
	}
	if len(c.seats) > 0 {
		return
	}
	g.cells = slices.DeleteFunc(g.cells, func(x *cell[O]) bool { return x == c })
	delete(g.byID, c.id)
	delete(g.touched, c)
	if c.gates[0] != nil { // others have been told of it
		g.gone = append(g.gone, c.id)
	}
}

// gateways are the first few members on the ring of keys, from the slot's place on. So
// they stay the same while others come and go, and a member that comes back finds them as they
// were.
func (c *cell[O]) gateways(slot, few int) []*Seat[O] {
	n := len(c.ring)
	if n <= few {
		return c.ring
	}
	from := uint64(slot) << 61
	i, _ := slices.BinarySearchFunc(c.ring, from, func(s *Seat[O], p uint64) int { return cmp.Compare(s.point, p) })
	out := make([]*Seat[O], few)
	for k := range out {
		out[k] = c.ring[(i+k)%n]
	}
	return out
}

// look brings the gateways up to date, and returns for which slots they are others
// than before, as bits.
func (c *cell[O]) look(few int) (changed uint) {
	for slot := range c.gates {
		now, told := c.gateways(slot, few), c.gates[slot]
		if told != nil && slices.EqualFunc(now, told.members, func(s *Seat[O], m *wire.GroupMember) bool { return s.member.message == m }) {
			continue
		}
		changed |= 1 << slot
		gw := &gateways{members: make([]*wire.GroupMember, len(now))}
		sums := make([]uint64, len(now))
		for i, s := range now {
			gw.members[i], sums[i] = s.member.message, s.member.sums[0]
		}
		gw.sum = wire.ListSum(sums)
		gw.encoded = encodeCell(&wire.GroupCell{Cell: c.id, Zone: c.zone, Gateways: gw.members})
		c.gates[slot] = gw
	}
	return changed
}

// encodeCell encodes a cell once for all messages that it is in. That fails for labels
// alone that are no text, which wire.CheckHello does not let in; such a cell is left out.
func encodeCell(c *wire.GroupCell) []byte {
	b, err := wire.AppendCell(nil, c)
	if err != nil {
		return nil
	}
	return b
}

// fewFor is how many gateways of a cell are told where there are so many cells.
func fewFor(cells int) int {
	few := wire.MaxGateways
	for few > 1 && few*cells > manyGateways {
		few /= 2
	}
	return few
}
