package members

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

// reader is a member of a group, as far as it reads.
type reader struct {
	m       *member
	seat    *seat
	version uint64
	cell    uint32
	members map[wire.Key]bool
	cells   map[uint32][]wire.Key
	deaf    bool // its queue is full
	got     int  // messages
	bytes   int
}

// take applies a message by the rules of docs/formats.md.
func (r *reader) take(t testing.TB, msg []byte) {
	t.Helper()
	b, err := wire.ReadFrame(bufio.NewReader(bytes.NewReader(msg)), wire.MaxMemberEvent, nil)
	if err != nil {
		t.Fatal(err)
	}
	ev, err := wire.ParseMemberEvent(b)
	if err != nil {
		t.Fatal(err)
	}
	u := ev.GetUpdate()
	if u.From == 0 {
		r.members, r.cells = map[wire.Key]bool{}, map[uint32][]wire.Key{}
	} else if u.From != r.version || u.Cell != r.cell {
		t.Fatalf("update from %d of cell %d, the member has %d of %d", u.From, u.Cell, r.version, r.cell)
	}
	r.version, r.cell = u.Version, u.Cell
	for k := range wire.Keys(u.Left) {
		delete(r.members, k)
	}
	for _, m := range u.Joined {
		r.members[wire.Key(m.Key)] = true
	}
	for _, c := range u.Cells {
		delete(r.cells, c.Cell)
		for _, m := range c.Gateways {
			r.cells[c.Cell] = append(r.cells[c.Cell], wire.Key(m.Key))
		}
	}
	r.got++
	r.bytes += len(msg)
}

// swarm is a group with its readers.
type swarm struct {
	*group
	readers map[*member]*reader
	next    uint64
}

func newSwarm() *swarm {
	return &swarm{group: newGroup(blockdev.Digest{1}), readers: map[*member]*reader{}}
}

func (s *swarm) join(zone, rack string) *reader {
	s.next++
	m := &member{zone: zone, rack: rack, session: &session{}}
	binary.BigEndian.PutUint64(m.key[:], s.next)
	m.message = &wire.GroupMember{Key: m.key[:], Rack: rack, Addrs: [][]byte{{10, 1, byte(s.next >> 8), byte(s.next), 30, 23}}}
	r := &reader{m: m, seat: s.add(m)}
	s.readers[m] = r
	return r
}

func (s *swarm) leave(r *reader) {
	delete(s.readers, r.m)
	s.remove(r.seat)
}

func (s *swarm) flushAll(t testing.TB, read bool) (again bool) {
	t.Helper()
	again, err := s.flush(func(m *member, msg []byte) bool {
		r, ok := s.readers[m]
		if !ok {
			t.Error("a message for somebody who has left")
			return true
		}
		if r.deaf {
			return false
		}
		if read {
			r.take(t, msg)
		} else {
			r.got++
			r.bytes += len(msg)
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return again
}

// check compares what readers know with what is.
func (s *swarm) check(t *testing.T) {
	t.Helper()
	total := 0
	for _, c := range s.cells {
		total += len(c.seats)
		if len(c.seats) == 0 || len(c.seats) > maxCell {
			t.Fatalf("cell %d has %d members", c.id, len(c.seats))
		}
		for i, seat := range c.seats {
			if seat.pos != i || seat.cell != c || seat.m.zone != c.zone {
				t.Fatalf("seat %d of cell %d is at %d of %d", i, c.id, seat.pos, seat.cell.id)
			}
			if r := s.readers[seat.m]; r.seat != seat && !r.deaf {
				t.Fatal("two seats for one member")
			}
		}
	}
	if total != len(s.readers) || total != s.size {
		t.Fatalf("%d members in cells, %d in the group, size %d", total, len(s.readers), s.size)
	}
	for _, r := range s.readers {
		if r.deaf {
			continue
		}
		c := r.seat.cell
		if r.cell != c.id || len(r.members) != len(c.seats) {
			t.Fatalf("a member of cell %d knows %d of %d members, of cell %d", c.id, len(r.members), len(c.seats), r.cell)
		}
		for _, seat := range c.seats {
			if !r.members[seat.m.key] {
				t.Fatal("a member does not know another of its cell")
			}
		}
		if len(r.cells) != len(s.cells)-1 {
			t.Fatalf("a member knows gateways of %d other cells of %d", len(r.cells), len(s.cells)-1)
		}
		for _, other := range s.cells {
			if other == c {
				continue
			}
			want := other.gateways(c)
			if len(want) != min(len(other.seats), wire.MaxGateways) {
				t.Fatalf("%d gateways of a cell of %d", len(want), len(other.seats))
			}
			if !slices.EqualFunc(want, r.cells[other.id], func(s *seat, k wire.Key) bool { return s.m.key == k }) {
				t.Fatalf("a member of cell %d knows other gateways of cell %d than there are", c.id, other.id)
			}
		}
	}
}

// Whatever happens, and whoever does not read for a while: after a flush every
// member knows its cell and the other cells' gateways.
func TestCells(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 7))
			s := newSwarm()
			zones := []string{"", "a", "b"}[:1+rnd.IntN(3)]
			for range 120 {
				for range rnd.IntN(40) {
					s.join(zones[rnd.IntN(len(zones))], fmt.Sprint(rnd.IntN(30)))
				}
				leave := rnd.IntN(30)
				if rnd.IntN(20) == 0 {
					leave = len(s.readers) * 3 / 4 // a power cut
				}
				for _, r := range s.readers {
					if leave--; leave < 0 {
						break
					}
					s.leave(r)
				}
				for _, r := range s.readers {
					if r.deaf != (rnd.IntN(50) == 0) {
						r.deaf = !r.deaf
					}
				}
				s.flushAll(t, true)
				s.check(t)
			}
			if len(s.cells) < 2 {
				t.Errorf("%d members in %d cells: too few for this test", s.size, len(s.cells))
			}
		})
	}
}

// Racks stay together where there is room.
func TestRacks(t *testing.T) {
	s := newSwarm()
	for i := range 1000 {
		s.join("z", fmt.Sprint(i/40)) // one rack after the other
	}
	cells := map[string]map[uint32]bool{}
	for _, r := range s.readers {
		if cells[r.m.rack] == nil {
			cells[r.m.rack] = map[uint32]bool{}
		}
		cells[r.m.rack][r.seat.cell.id] = true
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
	got, bytes, s := joinMany(t, 10_000, 10, true)
	s.check(t)
	perNode := float64(got) / 10_000
	t.Logf("%.1f messages and %.0f bytes for each node, %d cells", perNode, float64(bytes)/10_000, len(s.cells))
	if perNode > 10 {
		t.Errorf("%.1f messages for each node, there were 10 flushes", perNode)
	}
	if most := float64(bytes) / 10_000; most > 100_000 {
		t.Errorf("%.0f bytes for each node", most)
	}
	for _, r := range s.readers {
		if n := len(r.members) + len(s.cells)*wire.MaxGateways; n > 1000 {
			t.Fatalf("a node knows %d members", n)
		}
	}
}

// joinMany has n nodes join in flushes steps and returns what was sent in all.
func joinMany(t testing.TB, n, flushes int, read bool) (messages, size int, s *swarm) {
	s = newSwarm()
	for i := range n {
		s.join(fmt.Sprint(i%2), fmt.Sprint(i/40))
		if (i+1)%(n/flushes) == 0 {
			s.flushAll(t, read)
		}
	}
	for _, r := range s.readers {
		messages, size = messages+r.got, size+r.bytes
	}
	return messages, size, s
}

// BenchmarkJoin is n nodes that join a group within 10 flushes, so 1 to 5 s: what
// the supernode has to compute, and what it sends.
func BenchmarkJoin(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				messages, size, _ := joinMany(b, n, 10, false)
				b.ReportMetric(float64(messages)/float64(n), "msgs/node")
				b.ReportMetric(float64(size)/float64(n), "B/node")
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/node")
		})
	}
}
