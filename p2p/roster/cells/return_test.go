package cells

import (
	"fmt"
	"slices"
	"testing"

	"github.com/shoalfs/shoal/p2p/wire"
)

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
