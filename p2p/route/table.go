package route

import (
	"fmt"
	"slices"
	"strings"

	"github.com/shoalfs/shoal/blockdev"
)

// Limits of a View. A view beyond them is refused.
const (
	MaxMembers  = 4096  // members of one cell; a few hundred is what a cell should have
	MaxGateways = 16384 // gateways, all cells together
)

// Member is a node of a group.
type Member struct {
	// ID is the node's peer ID.
	ID string
	// Zone is where it is; traffic between zones is kept to one copy. Rack is
	// what the supernode may form cells by. Both may be empty.
	Zone, Rack string
	// Cell is its cell. Zone and Cell together name a cell.
	Cell uint32
	// Full says that it has told the supernode that it has the whole image.
	Full bool
}

// View is what one node knows about a group: the supernode hands it out.
type View struct {
	// Group is the image's manifest digest.
	Group blockdev.Digest
	// Version grows with every change.
	Version uint64
	// Zone and Cell are those of the cell that the view is for.
	Zone string
	Cell uint32
	// Members are all of that cell; whether the viewer itself is among them makes
	// no difference.
	Members []Member
	// Gateways are a few members (8 are enough) of every other cell of the group.
	// They carry all that goes between the cells, so each viewer should be
	// given others.
	Gateways []Member
}

// Table is a View made ready for decisions. It does not change and may be shared
// by goroutines, and by all (simulated) members of the cell.
type Table struct {
	view View
	// hash is that of each member's ID, then that of each gateway's.
	hash  []uint64
	full  []uint16 // members that have the whole image
	zones []zone   // the view's own first
	cell  uint64   // hash of the view's own cell
}

type cell struct {
	hash uint64
	gate []uint16 // positions in View.Gateways
}

type zone struct {
	hash  uint64
	cells []cell // without the view's own
}

// NewTable prepares v, which must not be changed any more. Members that occur
// twice, sit in another cell than the view's, or gateways of the view's own cell
// are errors, as is a view beyond the limits.
func NewTable(v View) (*Table, error) {
	if len(v.Members) > MaxMembers || len(v.Gateways) > MaxGateways {
		return nil, fmt.Errorf("view of group %s has %d members and %d gateways, at most %d and %d are taken: %w",
			v.Group, len(v.Members), len(v.Gateways), MaxMembers, MaxGateways, blockdev.ErrCorrupt)
	}
	t := &Table{view: v, hash: make([]uint64, 0, len(v.Members)+len(v.Gateways)), cell: cellHash(v.Zone, v.Cell)}
	seen := make(map[string]struct{}, cap(t.hash))
	for i := range cap(t.hash) {
		m := t.Member(i)
		if _, ok := seen[m.ID]; ok || m.ID == "" {
			return nil, fmt.Errorf("view of group %s: member %q occurs twice, or has no ID: %w", v.Group, m.ID, blockdev.ErrCorrupt)
		}
		seen[m.ID] = struct{}{}
		if home := m.Zone == v.Zone && m.Cell == v.Cell; home != (i < len(v.Members)) {
			return nil, fmt.Errorf("view of group %s: %q of zone %q, cell %d is on the wrong side of a view of zone %q, cell %d: %w",
				v.Group, m.ID, m.Zone, m.Cell, v.Zone, v.Cell, blockdev.ErrCorrupt)
		}
		t.hash = append(t.hash, hashID(m.ID))
		if m.Full && i < len(v.Members) {
			t.full = append(t.full, uint16(i))
		}
	}
	t.addCells()
	return t, nil
}

// addCells sorts the gateways into cells and zones.
func (t *Table) addCells() {
	order := make([]uint16, len(t.view.Gateways))
	for i := range order {
		order[i] = uint16(i)
	}
	gw := t.view.Gateways
	slices.SortStableFunc(order, func(a, b uint16) int {
		if c := strings.Compare(gw[a].Zone, gw[b].Zone); c != 0 {
			return c
		}
		return int(gw[a].Cell) - int(gw[b].Cell)
	})
	t.zones = append(t.zones, zone{hash: hashID(t.view.Zone)})
	for len(order) > 0 {
		first := gw[order[0]]
		n := 1
		for n < len(order) && gw[order[n]].Zone == first.Zone && gw[order[n]].Cell == first.Cell {
			n++
		}
		z := 0
		if first.Zone != t.view.Zone {
			if z = len(t.zones) - 1; z == 0 || gw[t.zones[z].cells[0].gate[0]].Zone != first.Zone {
				t.zones = append(t.zones, zone{hash: hashID(first.Zone)})
				z++
			}
		}
		t.zones[z].cells = append(t.zones[z].cells, cell{hash: cellHash(first.Zone, first.Cell), gate: order[:n:n]})
		order = order[n:]
	}
}

// cellHash names a cell to rank.
func cellHash(zone string, cell uint32) uint64 { return mix(hashID(zone) + uint64(cell) + 1) }

// Group returns the image's manifest digest.
func (t *Table) Group() blockdev.Digest { return t.view.Group }

// Version returns the view's version.
func (t *Table) Version() uint64 { return t.view.Version }

// Levels is how many levels the trees of the view's own cell have.
func (t *Table) Levels() int {
	levels := 0
	for n, width := len(t.view.Members), 1; n > 0; n, width = n-width, width*Fanout {
		levels++
	}
	return levels
}

// How many bytes a node should have asked for and not got yet, for each level of the
// trees that they come through, and for how many levels at least.
const (
	inflightPerLevel = 2 << 20
	inflightLevels   = 2
)

// Inflight is how many bytes of prefetch a node should have asked for and not got yet:
// where a tree has many levels, a chunk is on its way for longer, and so more of them
// have to be. A nil Table (no peers are known) has the least window.
func (t *Table) Inflight() int64 {
	levels := inflightLevels
	if t != nil {
		levels = max(levels, t.Levels())
	}
	return int64(levels) * inflightPerLevel
}

// Len is how many members and gateways there are.
func (t *Table) Len() int { return len(t.view.Members) + len(t.view.Gateways) }

// Member returns member i: first those of the cell, then the gateways, each in
// the view's order.
func (t *Table) Member(i int) Member {
	if n := len(t.view.Members); i >= n {
		return t.view.Gateways[i-n]
	}
	return t.view.Members[i]
}
