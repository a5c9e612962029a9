package route

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// digest returns the digest of test chunk i.
func digest(i int) blockdev.Digest {
	return sha256.Sum256(binary.BigEndian.AppendUint64([]byte("chunk"), uint64(i)))
}

// group describes members for tests: zones[z] lists the sizes of its cells.
type cluster struct {
	members []Member
	cells   map[Member][]Member // by {Zone, Cell}
}

func newCluster(zones ...[]int) *cluster {
	c := &cluster{cells: map[Member][]Member{}}
	cell := uint32(0)
	for z, sizes := range zones {
		for _, n := range sizes {
			for i := range n {
				m := Member{ID: fmt.Sprintf("z%d-c%d-n%d", z, cell, i), Zone: fmt.Sprint("zone", z), Cell: cell}
				c.members = append(c.members, m)
				k := Member{Zone: m.Zone, Cell: m.Cell}
				c.cells[k] = append(c.cells[k], m)
			}
			cell++
		}
	}
	return c
}

// view returns that of member m, with n gateways of each other cell, of those
// members that keep takes.
func (c *cluster) view(m Member, n int, keep func(Member) bool) View {
	v := View{Group: digest(-1), Version: 1, Zone: m.Zone, Cell: m.Cell}
	taken := map[Member]int{}
	for _, o := range c.members {
		k := Member{Zone: o.Zone, Cell: o.Cell}
		switch {
		case !keep(o):
		case o.Zone == m.Zone && o.Cell == m.Cell:
			v.Members = append(v.Members, o)
		case taken[k] < n:
			taken[k]++
			v.Gateways = append(v.Gateways, o)
		}
	}
	return v
}

func everybody(Member) bool { return true }

func mustTable(t testing.TB, v View) *Table {
	t.Helper()
	tab, err := NewTable(v)
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

func (c *cluster) group(t testing.TB, m Member, n int, keep func(Member) bool) *Group {
	t.Helper()
	return NewGroup(m, mustTable(t, c.view(m, n, keep)), NewBook(BookOptions{}))
}
