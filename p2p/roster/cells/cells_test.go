package cells

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/shoalfs/shoal/p2p/wire"
)

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
