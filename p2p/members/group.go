package members

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/p2p/wire"
)

// group is a group that this node is in, or wants to be in. Node.mu guards it.
type group struct {
	id      blockdev.Digest
	diffs   []blockdev.Digest
	grant   []byte
	home    *session // that keeps it; nil: none yet
	refused bool     // by home
	full    bool     // every byte of the image is here

	from    *session // that the view is from
	stream  int      // which of its streams
	version uint64
	cell    uint32
	zone    string
	members map[peer.ID]*entry // of the own cell
	cells   map[uint32]*cell   // the others
	gates   map[peer.ID]*entry // all gateways in cells
	view    *route.View        // of all this; nil: no view
	// What the home has been told that this node has, on its current stream, and may be
	// told to keep.
	offered offer
	anew    bool // an update did not fit: all is to be told
}

// offer is what of a view a join has named.
type offer uint8

const (
	offeredNothing offer = iota
	offeredMembers       // those of the own cell, and no other cell
	offeredAll           // and the gateways of all other cells
)

type cell struct {
	zone     string
	gateways []*entry
}

// entry is a member that this node knows.
type entry struct {
	id    peer.ID
	rack  string
	addrs []ma.Multiaddr
	full  bool
	sum   uint64 // of all that was said of it
}

func newEntry(m *wire.GroupMember) (*entry, error) {
	e := &entry{id: host.FromKey(wire.Key(m.Key)), rack: m.Rack, full: m.Full, sum: m.Sum()}
	for _, b := range m.Addrs {
		ap, err := wire.ParseAddr(b)
		if err != nil {
			return nil, err
		}
		a, err := manet.FromNetAddr(tcpAddr(ap))
		if err != nil {
			return nil, fmt.Errorf("address %s: %w", ap, err)
		}
		e.addrs = append(e.addrs, a)
	}
	return e, nil
}

// apply makes u part of what is known. An error says that u does not fit; then
// nothing is changed, and all of the group must be asked for.
func (g *group) apply(s *session, u *wire.GroupUpdate) error {
	if u.From != 0 && (g.from != s || g.stream != s.stream || u.From != g.version || u.Cell != g.cell || g.members == nil) {
		return fmt.Errorf("update of group %s from version %d of cell %d, this node has version %d of cell %d: %w",
			g.id, u.From, u.Cell, g.version, g.cell, blockdev.ErrCorrupt)
	}
	if (u.KeepMembers || u.KeepCells) && (g.offered == offeredNothing || g.members == nil || u.Cell != g.cell) {
		return fmt.Errorf("update of group %s that keeps parts of cell %d, and this node has not said that it has them: %w", g.id, u.Cell, blockdev.ErrCorrupt)
	}
	joined, err := entries(u.Joined)
	if err != nil {
		return err
	}
	type change struct {
		id uint32
		*cell
	}
	var changes []change
	for _, c := range u.Cells {
		gw, err := entries(c.Gateways)
		if err != nil {
			return err
		}
		changes = append(changes, change{c.Cell, &cell{c.Zone, gw}})
	}
	if u.From == 0 && !u.KeepMembers {
		g.members = make(map[peer.ID]*entry, len(joined))
	}
	if u.From == 0 && !(u.KeepCells && g.offered == offeredAll) {
		g.cells = make(map[uint32]*cell, len(changes))
	}
	g.from, g.stream, g.version, g.cell, g.zone, g.offered, g.anew = s, s.stream, u.Version, u.Cell, u.Zone, offeredNothing, false
	for key := range wire.Keys(u.Left) {
		delete(g.members, host.FromKey(key))
	}
	for _, e := range joined {
		g.members[e.id] = e
	}
	for _, c := range changes {
		if len(c.gateways) == 0 {
			delete(g.cells, c.id)
		} else {
			g.cells[c.id] = c.cell
		}
	}
	return g.remake()
}

func entries(ms []*wire.GroupMember) ([]*entry, error) {
	out := make([]*entry, len(ms))
	for i, m := range ms {
		var err error
		if out[i], err = newEntry(m); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// remake makes the view again.
func (g *group) remake() error {
	v := &route.View{Group: g.id, Version: g.version, Zone: g.zone, Cell: g.cell}
	v.Members = make([]route.Member, 0, len(g.members))
	for _, e := range g.members {
		if len(e.addrs) == 0 {
			continue // it shares nothing, and nobody's tree has it
		}
		v.Members = append(v.Members, route.Member{ID: string(e.id), Zone: g.zone, Rack: e.rack, Cell: g.cell, Full: e.full})
	}
	g.gates = make(map[peer.ID]*entry, wire.MaxGateways*len(g.cells))
	for id, c := range g.cells {
		if id == g.cell {
			continue // all of it is known
		}
		for _, e := range c.gateways {
			// A member that has just moved may still be listed in its old cell.
			if _, twice := g.gates[e.id]; twice || g.members[e.id] != nil || len(e.addrs) == 0 {
				continue
			}
			g.gates[e.id] = e
			v.Gateways = append(v.Gateways, route.Member{ID: string(e.id), Zone: c.zone, Rack: e.rack, Cell: id})
		}
	}
	if len(v.Members) > route.MaxMembers || len(v.Gateways) > route.MaxGateways {
		n, m := len(v.Members), len(v.Gateways)
		g.drop()
		return fmt.Errorf("group %s has %d members in a cell and %d gateways, at most %d and %d are taken: %w",
			g.id, n, m, route.MaxMembers, route.MaxGateways, blockdev.ErrCorrupt)
	}
	// In an order that does not depend on maps, for logs and tests.
	for _, ms := range [][]route.Member{v.Members, v.Gateways} {
		slices.SortFunc(ms, func(a, b route.Member) int { return strings.Compare(a.ID, b.ID) })
	}
	g.view = v
	return nil
}

// drop forgets the members of the group.
func (g *group) drop() {
	g.from, g.version, g.members, g.cells, g.gates, g.view, g.offered = nil, 0, nil, nil, nil, nil, offeredNothing
}

// have is what a join on s says that this node has: a list of an earlier stream, or of
// another supernode. Nil: nothing, or what s has sent on this very stream, and then the
// node joins again to be told everything, or that it is full.
func (g *group) have(s *session) *wire.GroupHave {
	g.offered = offeredNothing
	if g.members == nil || g.anew || g.from == s && g.stream == s.stream {
		return nil
	}
	h := &wire.GroupHave{Cell: g.cell, Members: listSum(slices.Collect(maps.Values(g.members)))}
	if g.offered = offeredMembers; len(g.cells) <= wire.MaxHaveCells {
		g.offered = offeredAll
		for _, id := range slices.Sorted(maps.Keys(g.cells)) {
			h.Cells, h.Gateways = append(h.Cells, id), append(h.Gateways, listSum(g.cells[id].gateways))
		}
	}
	return h
}

func listSum(es []*entry) uint64 {
	sums := make([]uint64, len(es))
	for i, e := range es {
		sums[i] = e.sum
	}
	return wire.ListSum(sums)
}

// find returns what is known of a peer.
func (g *group) find(id peer.ID) *entry {
	if e := g.members[id]; e != nil {
		return e
	}
	return g.gates[id]
}

// View returns what is known of a group, to be treated as read-only; nil: this
// node is not in the group, or no supernode has sent it the members yet.
func (n *Node) View(manifest blockdev.Digest) *route.View {
	n.mu.Lock()
	defer n.mu.Unlock()
	if g := n.groups[manifest]; g != nil {
		return g.view
	}
	return nil
}

// setDiffsLocked says which diffs a group's image has: none, if it is left.
func (n *Node) setDiffsLocked(g *group, diffs []blockdev.Digest) {
	for _, d := range g.diffs {
		rest := slices.DeleteFunc(n.byDiff[d], func(o *group) bool { return o == g })
		if len(rest) == 0 {
			delete(n.byDiff, d)
		} else {
			n.byDiff[d] = rest
		}
	}
	g.diffs = diffs
	for _, d := range diffs {
		if !slices.Contains(n.byDiff[d], g) { // an image may have a layer twice
			n.byDiff[d] = append(n.byDiff[d], g)
		}
	}
}

// Groups returns the groups of the images on this node that have this diff, those
// with most members first. It is called for each request for chunks.
func (n *Node) Groups(diff blockdev.Digest) []blockdev.Digest {
	n.mu.Lock()
	defer n.mu.Unlock()
	found := slices.Clone(n.byDiff[diff])
	slices.SortFunc(found, func(a, b *group) int {
		if c := b.known() - a.known(); c != 0 {
			return c
		}
		return strings.Compare(string(a.id[:]), string(b.id[:]))
	})
	ids := make([]blockdev.Digest, len(found))
	for i, g := range found {
		ids[i] = g.id
	}
	return ids
}

func (g *group) known() int { return len(g.members) + len(g.gates) }

// Addrs returns where a member of one of this node's groups listens; false: it is
// not known, or shares nothing.
func (n *Node) Addrs(id peer.ID) (peer.AddrInfo, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, g := range n.groups {
		if e := g.find(id); e != nil && len(e.addrs) > 0 {
			return peer.AddrInfo{ID: id, Addrs: slices.Clone(e.addrs)}, true
		}
	}
	return peer.AddrInfo{}, false
}
