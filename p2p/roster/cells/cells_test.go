package cells

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
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

// Whatever happens, and whoever does not read for a while, is away and comes back with
// what it knows or with nothing, moves to another address, or has the whole image:
// after a flush every member knows its cell and the other cells' gateways.
func TestCells(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 7))
			s := newSwarm(t, 1)
			zones := []string{"", "a", "b"}[:1+rnd.IntN(3)]
			most := 0
			for range 80 {
				for range rnd.IntN(40) {
					s.join(zones[rnd.IntN(len(zones))], fmt.Sprint(rnd.IntN(30))).old = rnd.IntN(4) == 0
				}
				leave := rnd.IntN(30)
				if rnd.IntN(20) == 0 {
					leave = len(s.readers) * 3 / 4 // a power cut
				}
				for r := range s.readers {
					if leave--; leave < 0 {
						break
					}
					s.leave(r)
				}
				for r := range s.readers {
					if r.deaf != (rnd.IntN(50) == 0) {
						r.deaf = !r.deaf
					}
					switch {
					case r.away && rnd.IntN(2) == 0: // it comes back
						r.away = false
						s.Ask(r.seat, r.have())
					case rnd.IntN(50) == 0:
						r.away = true
					case rnd.IntN(80) == 0: // it has been away for longer than its lease
						s.Remove(r.seat)
						r.seat = s.Add(r, r.m, r.have())
					case rnd.IntN(60) == 0:
						s.SetFull(r.seat, !r.seat.Full())
					case rnd.IntN(100) == 0:
						r.m = NewMember(r.m.Zone, &wire.GroupMember{Key: r.m.key[:], Rack: r.m.Rack, Addrs: [][]byte{{10, 9, byte(rnd.IntN(255)), 1, 30, 23}}})
						s.SetMember(r.seat, r.m)
					}
				}
				s.flush()
				s.check()
				most = max(most, len(s.cells))
			}
			if most < 2 {
				t.Error("never two cells: too few members for this test")
			}
		})
	}
}

// Racks stay together where there is room.
func TestRacks(t *testing.T) {
	s := newSwarm(t, 1)
	for i := range 1000 {
		s.join("z", fmt.Sprint(i/40)) // one rack after the other
	}
	cells := map[string]map[uint32]bool{}
	for r := range s.readers {
		if cells[r.m.Rack] == nil {
			cells[r.m.Rack] = map[uint32]bool{}
		}
		cells[r.m.Rack][r.seat.cell.id] = true
	}
	split := 0
	for _, c := range cells {
		split += len(c) - 1
	}
	if split > len(s.cells) {
		t.Errorf("%d racks are split %d times over %d cells", len(cells), split, len(s.cells))
	}
}

// Lists and messages stay small when 10,000 nodes join within seconds.
func TestTenThousand(t *testing.T) {
	got, bytes, s := joinMany(t, 10_000, 10, 2, 10)
	s.check()
	perNode := float64(got) / 10_000
	t.Logf("%.1f messages and %.0f bytes for each node, %d cells", perNode, float64(bytes)/10_000, len(s.cells))
	if perNode > 10 {
		t.Errorf("%.1f messages for each node, there were 10 flushes", perNode)
	}
	if most := float64(bytes) / 10_000; most > 40_000 {
		t.Errorf("%.0f bytes for each node", most)
	}
	for r := range s.readers {
		if n := len(r.members) + len(s.cells)*wire.MaxGateways; n > 1000 {
			t.Fatalf("a node knows %d members", n)
		}
	}
}

// A zone is a free label. Where there are more than MaxZones, the others are in the
// common zone, and each member hears of a few dozen cells, not of thousands.
func TestManyZones(t *testing.T) {
	s := newSwarm(t, 1)
	honest := s.join("east", "r1")
	for i := range 4200 {
		s.next++
		r := &reader{m: s.member(s.next, fmt.Sprintf("%064d", i), strings.Repeat("r", wire.MaxLabel), 4)}
		r.seat = s.Add(r, r.m, nil)
		s.readers[r] = true
	}
	s.flush()
	s.checkCells()
	if len(s.zones) != MaxZones {
		t.Errorf("%d zones", len(s.zones))
	}
	if honest.bytes > 200_000 {
		t.Errorf("a member is sent %d bytes", honest.bytes)
	}
	// A zone that is empty makes room for another one.
	for r := range s.readers {
		if r.m.Zone == r.seat.zone && r.seat.zone != "east" {
			s.leave(r)
			break
		}
	}
	if r := s.join("west", ""); r.seat.zone != "west" {
		t.Error("no room after a zone has become empty")
	}
	s.flush()
	s.checkCells()
}

// The most members, with the longest labels and addresses, in the smallest cells that
// churn can leave: no message is longer than what nodes take.
func TestLongestMessage(t *testing.T) {
	s := newSwarm(t, 0)
	for i := range MaxSize {
		s.next++
		r := &reader{m: s.member(s.next, fmt.Sprintf("%064d", i%MaxZones), strings.Repeat("r", wire.MaxLabel), 0)}
		for a := range 4 {
			r.m.message.Addrs = append(r.m.message.Addrs, append(make([]byte, 15), byte(i), 30, byte(a)))
		}
		id := uint32(1 + i/smallCell)
		c := s.byID[id]
		if c == nil {
			c = s.newCell(id, fmt.Sprintf("%064d", id%MaxZones))
		}
		r.seat = &Seat[*reader]{Owner: r, member: r.m, zone: c.zone, point: binary.BigEndian.Uint64(r.m.key[:8])}
		s.put(c, r.seat)
		s.size++
	}
	u := s.Collect(receiver)
	longest := 0
	for i := range u.parts {
		if msg, err := encode(u.whole(&u.parts[i])); err != nil {
			t.Fatal(err)
		} else {
			longest = max(longest, len(msg))
		}
		if i == 20 {
			break // all are alike
		}
	}
	t.Logf("%d members in %d cells: %d gateways of each, %d bytes", s.Size(), len(s.cells), s.few, longest)
	if s.few >= wire.MaxGateways || s.few < 1 {
		t.Errorf("%d gateways of each of %d cells", s.few, len(s.cells))
	}
}

// Members that lost their connection are told only what has changed meanwhile.
func TestHave(t *testing.T) {
	s := newSwarm(t, 1)
	for i := range 1000 {
		s.join(fmt.Sprint(i%2), "")
	}
	s.flush()
	full := 0
	for r := range s.readers {
		full = max(full, r.bytes)
		r.got, r.bytes = 0, 0
	}
	back := func(r *reader) {
		r.got, r.bytes = 0, 0
		s.Ask(r.seat, r.have())
	}
	for r := range s.readers {
		back(r)
	}
	s.flush()
	s.check()
	for r := range s.readers {
		if r.got != 1 || r.bytes > 60 {
			t.Fatalf("nothing has changed: %d messages, %d bytes", r.got, r.bytes)
		}
	}
	// One that has left: its own cell is told who is in it, and those that have it as
	// gateway of that cell.
	var gone *reader
	for r := range s.readers {
		if gone = r; slices.Contains(r.seat.cell.gateways(1, wire.MaxGateways), r.seat) {
			break
		}
	}
	s.leave(gone)
	for r := range s.readers {
		r.away = true
	}
	s.flush()
	for r := range s.readers {
		r.away = false
		back(r)
	}
	s.flush()
	s.check()
	sum := 0
	for r := range s.readers {
		sum += r.bytes
		if r.seat.cell != gone.seat.cell && r.bytes > 700 {
			t.Fatalf("one gateway of one cell is another, and a member of another cell is sent %d bytes", r.bytes)
		}
	}
	t.Logf("all of it: %d bytes; one of 1,000 has left: %d bytes on average", full, sum/len(s.readers))
	// Nonsense gets everything.
	for r := range s.readers {
		r.got, r.bytes = 0, 0
		s.Ask(r.seat, &wire.GroupHave{Cell: r.cell + 1, Members: 7, Cells: []uint32{3}, Gateways: []uint64{4}})
	}
	s.flush()
	s.check()
}

// After a restart of the supernode, which remembers nothing, the cells are the same
// when all are back, in whatever order they come, and nobody is sent its list anew.
func TestRestore(t *testing.T) {
	s := newSwarm(t, 1)
	var all []*reader
	for i := range 1500 {
		all = append(all, s.join(fmt.Sprint(i%3), fmt.Sprint(i/40)))
		if i%150 == 0 {
			s.flush()
		}
	}
	for i, r := range all {
		if i%7 == 0 { // some have left meanwhile
			s.leave(r)
		} else {
			s.SetFull(r.seat, i%2 == 0)
		}
	}
	s.flush()
	s.check()
	before := s
	s = newSwarm(t, 1)
	s.Restore()
	for r := range before.readers { // in no order
		r.got, r.bytes = 0, 0
		full := r.seat.Full()
		r.seat = s.Add(r, r.m, r.have())
		s.SetFull(r.seat, full)
		s.readers[r] = true
		if len(s.readers)%500 == 0 {
			s.flush()
		}
	}
	late := s.join("0", "")
	late.t = t
	s.flush()
	for r := range s.readers {
		if (r.got > 0) != (r == late) {
			t.Fatalf("while others come back, a member is sent %d messages", r.got)
		}
	}
	s.Restored()
	s.flush()
	s.check()
	sum := 0
	for r := range s.readers {
		sum += r.bytes
	}
	mean := (sum - late.bytes) / (len(s.readers) - 1)
	t.Logf("%d cells, %d bytes for each of %d", len(s.cells), mean, len(s.readers))
	if mean > 2000 { // one in twelve has a member more in its cell
		t.Errorf("%d bytes for each", mean)
	}
	// Half never come back: small cells are merged, and all hear of it.
	before = s
	s = newSwarm(t, 1)
	s.Restore()
	for r := range before.readers {
		if r.m.key[0]%8 != 0 {
			continue
		}
		r.seat = s.Add(r, r.m, r.have())
		s.readers[r] = true
	}
	s.Restored()
	s.flush()
	s.check()
	if len(s.cells) > 6 {
		t.Errorf("%d members are left, in %d cells", s.Size(), len(s.cells))
	}
}

// Who claims cells that there are not makes no more of them than there may be, and none
// when nobody is coming back.
func TestClaims(t *testing.T) {
	s := newSwarm(t, 1)
	add := func(id uint32) *reader {
		s.next++
		r := &reader{m: s.member(s.next, "z", "", 1)}
		r.seat = s.Add(r, r.m, &wire.GroupHave{Cell: id})
		s.readers[r] = true
		return r
	}
	for i := range uint32(1000) {
		add(100 + i)
	}
	if len(s.cells) > 1000/fullCell+1 {
		t.Errorf("%d cells", len(s.cells))
	}
	s = newSwarm(t, 1)
	s.Restore()
	for i := range uint32(1000) {
		add(100 + i)
	}
	add(1<<32 - 1)
	add(1 << 31)
	if len(s.cells) > maxKept+2 {
		t.Errorf("%d cells", len(s.cells))
	}
	s.Restored()
	s.flush()
	if len(s.cells) > 2*1000/fullCell {
		t.Errorf("%d cells when all are back", len(s.cells))
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

// BenchmarkJoin is n nodes that join a group within 10 flushes, so 1 to 5 s: what
// the supernode has to compute, and what it sends.
func BenchmarkJoin(b *testing.B) {
	for _, c := range []struct{ nodes, zones int }{{1000, 2}, {10_000, 2}, {10_000, 1}, {10_000, 1000}} {
		b.Run(fmt.Sprintf("%d/zones=%d", c.nodes, c.zones), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				messages, size, _ := joinMany(b, c.nodes, 10, c.zones, 0)
				b.ReportMetric(float64(messages)/float64(c.nodes), "msgs/node")
				b.ReportMetric(float64(size)/float64(c.nodes), "B/node")
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(c.nodes), "ns/node")
		})
	}
}

// BenchmarkZones is the first flush of 1,000 nodes that have a zone each: all of it,
// and the part that holds the lock.
func BenchmarkZones(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		s := newSwarm(b, 0)
		for i := range 1000 {
			s.join(fmt.Sprint(i), "")
		}
		b.StartTimer()
		s.flush()
	}
}

// BenchmarkGroups is 10,000 members of 100 groups, one flush of each in which one
// member is new: what is done under the lock, and all of it.
func BenchmarkGroups(b *testing.B) {
	const nodes, groups = 10_000, 100
	var all []*swarm
	for g := range groups {
		s := newSwarm(b, 0)
		s.Group = New[*reader](blockdev.Digest{byte(g)})
		for i := range nodes {
			s.join(fmt.Sprint(i%2), fmt.Sprint(i/40))
		}
		s.flush()
		all = append(all, s)
	}
	for _, sent := range []bool{false, true} {
		b.Run(fmt.Sprintf("send=%v", sent), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				for _, s := range all {
					r := s.join("0", "")
					if u := s.Collect(receiver); sent {
						if _, err := u.Send(); err != nil {
							b.Fatal(err)
						}
					}
					s.leave(r)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/groups, "ns/group")
		})
	}
}
