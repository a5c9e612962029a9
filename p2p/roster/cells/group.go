package cells

import (
	"encoding/binary"
	"iter"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

const (
	// MaxZones is how many zones a group tells apart, the common one included.
	MaxZones = 32
	// MaxSize is how many members a group may have.
	MaxSize = 1 << 16

	// maxCell is the most members of a cell. A new cell is begun when all of a
	// zone have fullCell; the rest is room for racks to stay together.
	maxCell  = 256
	fullCell = 192
	// smallCell is below how many members a cell is merged into another, if
	// there is one that is not full then.
	smallCell = 48
	// maxKept is how many cells a group may have for members to bring back theirs.
	maxKept = 256
	// maxKeptID is the highest ID of such a cell. There is room for others above it.
	maxKeptID = 1 << 31
)

// Member is a node as others see it. It does not change.
type Member struct {
	Zone, Rack string
	key        wire.Key
	message    *wire.GroupMember
	full       *wire.GroupMember // the same, that has all of the image
	sums       [2]uint64         // of message and full
}

// NewMember returns a member whose message, which must not change any more, is m, with
// a key of 32 bytes.
func NewMember(zone string, m *wire.GroupMember) *Member {
	full := &wire.GroupMember{Key: m.Key, Rack: m.Rack, Addrs: m.Addrs, Full: true}
	return &Member{Zone: zone, Rack: m.Rack, key: wire.Key(m.Key), message: m, full: full, sums: [2]uint64{m.Sum(), full.Sum()}}
}

// Message is what others get of it.
func (m *Member) Message() *wire.GroupMember { return m.message }

// Seat is a member's place in a group. Owner is whose it is.
type Seat[O any] struct {
	Owner  O
	member *Member
	cell   *cell[O]
	zone   string // the cell's
	pos    int    // in cell.seats
	point  uint64 // in cell.ring
	synced bool   // the member has what its cell was told last
	full   bool   // it has all of the image
	have   *wire.GroupHave
}

// Full says whether the member has all of the image.
func (s *Seat[O]) Full() bool { return s.full }

// Member is what others get of it.
func (s *Seat[O]) Member() *Member { return s.member }

func (s *Seat[O]) message() *wire.GroupMember {
	if s.full {
		return s.member.full
	}
	return s.member.message
}

func (s *Seat[O]) sum() uint64 {
	if s.full {
		return s.member.sums[1]
	}
	return s.member.sums[0]
}

// Group is the members of one image's group. It is for one goroutine at a time.
type Group[O any] struct {
	id      blockdev.Digest
	version uint64
	cells   []*cell[O] // by age
	byID    map[uint32]*cell[O]
	zones   map[string]int // seats in each, those of the common zone as well
	next    uint32         // the highest ID of a cell that there was
	size    int

	// What members have not been told yet: cells whose gateways may be others, and
	// cells that are gone.
	touched map[*cell[O]]struct{}
	gone    []uint32
	few     int // gateways of a cell that members were told last

	restoring bool
}

// New returns an empty group.
func New[O any](id blockdev.Digest) *Group[O] {
	return &Group[O]{id: id, byID: map[uint32]*cell[O]{}, zones: map[string]int{}, touched: map[*cell[O]]struct{}{}, few: wire.MaxGateways}
}

// Size is how many members there are.
func (g *Group[O]) Size() int { return g.size }

// Zone is where members of a zone are: there, or in the common zone.
func (g *Group[O]) Zone(zone string) string {
	others := len(g.zones)
	if g.zones[""] > 0 {
		others--
	}
	if g.zones[zone] > 0 || others < MaxZones-1 {
		return zone
	}
	return ""
}

// InZone counts the members of a zone; of "", those of the common one.
func (g *Group[O]) InZone(zone string) int { return g.zones[zone] }

// All iterates over all seats.
func (g *Group[O]) All() iter.Seq[*Seat[O]] {
	return func(yield func(*Seat[O]) bool) {
		for _, c := range g.cells {
			for _, s := range c.seats {
				if !yield(s) {
					return
				}
			}
		}
	}
}

// Add gives a member a seat. have, which may be nil, is what it knows from before: it
// gets its seat in that cell again, if there is room.
func (g *Group[O]) Add(owner O, m *Member, have *wire.GroupHave) *Seat[O] {
	zone := g.Zone(m.Zone)
	s := &Seat[O]{Owner: owner, member: m, zone: zone, have: have,
		// Other places in each group, so that not the same ones are gateways everywhere.
		point: binary.BigEndian.Uint64(m.key[:8]) ^ binary.BigEndian.Uint64(g.id[:8])}
	c := g.back(zone, have)
	if c == nil {
		c = g.place(zone, m.Rack)
	}
	g.size++
	g.zones[zone]++
	g.put(c, s)
	return s
}

// back finds the cell that a member was in.
func (g *Group[O]) back(zone string, have *wire.GroupHave) *cell[O] {
	id := have.GetCell()
	if id == 0 || id > maxKeptID {
		return nil
	}
	c := g.byID[id]
	switch {
	case c != nil && c.zone == zone && len(c.seats) < maxCell:
		return c
	case c == nil && g.restoring && len(g.cells) < maxKept && !slices.Contains(g.gone, id):
		return g.newCell(id, zone)
	}
	return nil
}

// place finds the cell for a new member.
func (g *Group[O]) place(zone, rack string) *cell[O] {
	var best *cell[O]
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
		best = g.newCell(g.next+1, zone)
	}
	return best
}

// Remove takes a member out of the group.
func (g *Group[O]) Remove(s *Seat[O]) {
	c := s.cell
	g.take(c, s)
	g.size--
	if g.zones[s.zone]--; g.zones[s.zone] == 0 {
		delete(g.zones, s.zone)
	}
	if len(c.seats) < smallCell {
		g.merge(c)
	}
}

// SetFull notes that a member has all of the image now, or not any more.
func (g *Group[O]) SetFull(s *Seat[O], full bool) {
	if s.full != full {
		s.full = full
		s.cell.joined[s] = struct{}{}
	}
}

// SetMember changes what others get of a member, whose zone, rack and key stay.
func (g *Group[O]) SetMember(s *Seat[O], m *Member) {
	s.member = m
	s.cell.joined[s] = struct{}{}
	g.touched[s.cell] = struct{}{}
}

// Ask has a member told everything, but for what it says that it has; nil: nothing.
func (g *Group[O]) Ask(s *Seat[O], have *wire.GroupHave) { s.synced, s.have = false, have }

// Restore makes a new group one that is put together again after a restart: until
// Restored, members that say what they have get their cells back, and get nothing else,
// since they know more than is here.
func (g *Group[O]) Restore() { g.restoring = true }

// Restored ends that. Cells that have stayed small are merged.
func (g *Group[O]) Restored() {
	g.restoring = false
	for _, c := range slices.Clone(g.cells) {
		if len(c.seats) < smallCell {
			g.merge(c)
		}
	}
}
