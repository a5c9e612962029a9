package cells

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

// reader is a member of a group, as far as it reads.
type reader struct {
	t       testing.TB // nil: it counts alone
	m       *Member
	seat    *Seat[*reader]
	version uint64
	cell    uint32
	members map[wire.Key]*wire.GroupMember
	cells   map[uint32][]*wire.GroupMember
	old     bool // an earlier version's, which says nothing about what it has
	deaf    bool // its queue is full
	away    bool // it has no connection
	got     int  // messages
	bytes   int
}

// Send applies a message by the rules of docs/formats.md.
func (r *reader) Send(msg []byte) bool {
	if r.deaf {
		return false
	}
	r.got++
	r.bytes += len(msg)
	if r.t == nil {
		return true
	}
	r.t.Helper()
	b, err := wire.ReadFrame(bufio.NewReader(bytes.NewReader(msg)), wire.MaxMemberEvent, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	ev, err := wire.ParseMemberEvent(b)
	if err != nil {
		r.t.Fatal(err)
	}
	u := ev.GetUpdate()
	switch {
	case r.old && (u.KeepCells || u.KeepMembers):
		r.t.Fatal("a node of an earlier version is to keep what it has")
	case u.From == 0:
		if !u.KeepMembers {
			r.members = map[wire.Key]*wire.GroupMember{}
		}
		if !u.KeepCells {
			r.cells = map[uint32][]*wire.GroupMember{}
		}
	case u.From != r.version || u.Cell != r.cell:
		r.t.Fatalf("update from %d of cell %d, the member has %d of %d", u.From, u.Cell, r.version, r.cell)
	}
	r.version, r.cell = u.Version, u.Cell
	for k := range wire.Keys(u.Left) {
		delete(r.members, k)
	}
	for _, m := range u.Joined {
		r.members[wire.Key(m.Key)] = m
	}
	for _, c := range u.Cells {
		delete(r.cells, c.Cell)
		if len(c.Gateways) > 0 {
			r.cells[c.Cell] = c.Gateways
		}
	}
	return true
}

// have is what the reader says that it knows.
func (r *reader) have() *wire.GroupHave {
	if r.old || r.members == nil {
		return nil
	}
	h := &wire.GroupHave{Cell: r.cell, Members: listSum(slices.Collect(maps.Values(r.members)))}
	for _, id := range slices.Sorted(maps.Keys(r.cells)) {
		h.Cells, h.Gateways = append(h.Cells, id), append(h.Gateways, listSum(r.cells[id]))
	}
	return h
}

func listSum(ms []*wire.GroupMember) uint64 {
	var sums []uint64
	for _, m := range ms {
		sums = append(sums, m.Sum())
	}
	return wire.ListSum(sums)
}

// swarm is a group with its readers.
type swarm struct {
	*Group[*reader]
	t       testing.TB
	readers map[*reader]bool
	next    uint64
	read    uint64 // each how-manyeth reads; 0: none
}

func newSwarm(t testing.TB, read uint64) *swarm {
	return &swarm{Group: New[*reader](blockdev.Digest{1}), t: t, readers: map[*reader]bool{}, read: read}
}

func (s *swarm) member(n uint64, zone, rack string, addrs int) *Member {
	key := sha256.Sum256(binary.BigEndian.AppendUint64(nil, n))
	m := &wire.GroupMember{Key: key[:], Rack: rack}
	for i := range addrs {
		m.Addrs = append(m.Addrs, []byte{10, byte(1 + i), byte(n >> 8), byte(n), 30, 23})
	}
	return NewMember(zone, m)
}

func (s *swarm) join(zone, rack string) *reader {
	s.next++
	r := &reader{m: s.member(s.next, zone, rack, 1)}
	if s.read > 0 && s.next%s.read == 0 {
		r.t = s.t
	}
	r.seat = s.Add(r, r.m, nil)
	s.readers[r] = true
	return r
}

func (s *swarm) leave(r *reader) {
	delete(s.readers, r)
	s.Remove(r.seat)
}

func receiver(r *reader) Receiver {
	if r.away {
		return nil
	}
	return r
}

func (s *swarm) flush() (u *Update[*reader], again bool) {
	s.t.Helper()
	u = s.Collect(receiver)
	failed, err := u.Send()
	if err != nil {
		s.t.Fatal(err)
	}
	s.Failed(failed)
	return u, len(failed) > 0
}

// checkCells finds what is wrong with the cells.
func (s *swarm) checkCells() {
	t := s.t
	t.Helper()
	total, zones := 0, map[string]int{}
	for _, c := range s.cells {
		total += len(c.seats)
		zones[c.zone] += len(c.seats)
		if len(c.seats) == 0 || len(c.seats) > maxCell || len(c.ring) != len(c.seats) || s.byID[c.id] != c {
			t.Fatalf("cell %d has %d members, %d on its ring", c.id, len(c.seats), len(c.ring))
		}
		if !slices.IsSortedFunc(c.ring, byPoint) {
			t.Fatalf("the ring of cell %d is not in order", c.id)
		}
		for i, seat := range c.seats {
			if seat.pos != i || seat.cell != c || seat.zone != c.zone || c.zone != "" && seat.member.Zone != c.zone {
				t.Fatalf("seat %d of cell %d is at %d of %d", i, c.id, seat.pos, seat.cell.id)
			}
			if seat.Owner.seat != seat {
				t.Fatal("two seats for one member")
			}
		}
	}
	if total != len(s.readers) || total != s.Size() || !maps.Equal(zones, s.zones) || len(zones) > MaxZones || len(s.byID) != len(s.cells) {
		t.Fatalf("%d members in cells, %d in the group, size %d, zones %v, %v", total, len(s.readers), s.Size(), zones, s.zones)
	}
}

// check compares what readers know with what is.
func (s *swarm) check() {
	t := s.t
	t.Helper()
	s.checkCells()
	few := fewFor(len(s.cells))
	for r := range s.readers {
		if r.t == nil || r.deaf || r.away {
			continue
		}
		c := r.seat.cell
		if r.cell != c.id || len(r.members) != len(c.seats) {
			t.Fatalf("a member of cell %d knows %d of %d members, of cell %d", c.id, len(r.members), len(c.seats), r.cell)
		}
		for _, seat := range c.seats {
			m := r.members[seat.member.key]
			if m == nil || r.m.key[0]%8 == 0 && m.Sum() != seat.sum() { // of some is enough
				t.Fatalf("a member knows of another of its cell %v, it is %v", m, seat.message())
			}
		}
		if len(r.cells) != len(s.cells)-1 {
			t.Fatalf("a member knows gateways of %d other cells of %d", len(r.cells), len(s.cells)-1)
		}
		for _, other := range s.cells {
			if other == c {
				continue
			}
			want := other.gateways(c.slot, few)
			if len(want) != min(len(other.seats), few) {
				t.Fatalf("%d gateways of a cell of %d", len(want), len(other.seats))
			}
			if !slices.EqualFunc(want, r.cells[other.id], func(s *Seat[*reader], m *wire.GroupMember) bool { return s.member.key == wire.Key(m.Key) }) {
				t.Fatalf("a member of cell %d knows other gateways of cell %d than there are", c.id, other.id)
			}
		}
	}
}

// joinMany has n nodes of so many zones join in flushes steps and returns what was sent
// in all.
func joinMany(t testing.TB, n, flushes, zones int, read uint64) (messages, size int, s *swarm) {
	s = newSwarm(t, read)
	for i := range n {
		s.join(fmt.Sprint(i%zones), fmt.Sprint(i/40))
		if (i+1)%(n/flushes) == 0 {
			u, _ := s.flush()
			messages, size = messages+u.Messages, size+u.Bytes
		}
	}
	return messages, size, s
}
