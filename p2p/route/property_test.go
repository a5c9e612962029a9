package route

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// walk plays one search through all members: what a member lacks it asks for in
// turn. It returns how many members the request went through, and whether the
// chunk came. Dead members answer nobody.
type world struct {
	groups map[string]*Group
	dead   map[string]bool
	hops   int // the longest way so far
	asked  map[string]int
	has    map[have]bool
}

type have struct {
	id    string
	chunk blockdev.Digest
}

func (w *world) fetch(id string, chunk blockdev.Digest, p blockdev.Priority, hops int, path []string) bool {
	for _, before := range path {
		if before == id {
			panic(fmt.Sprintf("circle: %v then %s", path, id))
		}
	}
	w.hops = max(w.hops, hops)
	if w.has[have{id, chunk}] {
		return true
	}
	g := w.groups[id]
	ask := NewAsk(chunk, p, hops)
	for range 1000 {
		t := g.Next(&ask, 0)
		switch t.Kind {
		case Supernode:
			w.asked["supernode"]++
			w.has[have{id, chunk}] = true
			return true
		case Nobody:
			return false
		case Peer:
			w.asked[t.ID]++
			if t.ID == id {
				panic("asks itself: " + id)
			}
			if w.dead[t.ID] {
				g.Report(&ask, t, Dead, 0, time.Millisecond, 0)
				continue
			}
			if t.Hops < MaxHops && w.fetch(t.ID, chunk, p, t.Hops, append(path, id)) || t.Hops == MaxHops && w.has[have{t.ID, chunk}] {
				g.Report(&ask, t, OK, 0, time.Millisecond, 1)
				w.has[have{id, chunk}] = true
				return true
			}
			g.Report(&ask, t, Missing, 0, time.Millisecond, 0)
		}
	}
	return false
}

// Under any mix of views and deaths, no request goes in a circle and every chunk
// reaches every member that lives.
func TestEveryChunkReachesEveryMember(t *testing.T) {
	shapes := [][][]int{{{1}}, {{2}}, {{3}}, {{40}}, {{16}, {16}}, {{30, 30, 20}}, {{9, 9, 9}, {1}, {20, 2}, {5}, {5}, {5}}}
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 1))
		c := newCluster(shapes[seed%uint64(len(shapes))]...)
		dying, hidden := r.Float64()*r.Float64(), r.Float64()*r.Float64()
		w := world{groups: map[string]*Group{}, dead: map[string]bool{}, asked: map[string]int{}, has: map[have]bool{}}
		for _, m := range c.members {
			w.dead[m.ID] = r.Float64() < dying
			w.groups[m.ID] = c.group(t, m, 1+r.IntN(8), func(Member) bool { return r.Float64() >= hidden })
		}
		for chunk := range 20 {
			for _, m := range c.members {
				if !w.dead[m.ID] && !w.fetch(m.ID, digest(chunk), blockdev.Priority(chunk%2), 0, nil) {
					t.Fatalf("seed %d: chunk %d does not reach %s", seed, chunk, m.ID)
				}
			}
		}
		if w.hops > MaxHops {
			t.Errorf("seed %d: a request was forwarded %d times", seed, w.hops)
		}
	}
}

// Each member is an inner node as often as any other, so that uploads are even.
func TestTreesAreEven(t *testing.T) {
	const chunks, members = 4000, 64
	c := newCluster([]int{members})
	asked := map[string]int{}
	for _, m := range c.members {
		g := c.group(t, m, 8, everybody)
		for i := range chunks {
			a := NewAsk(digest(i), blockdev.Demand, 0)
			if to := g.Next(&a, 0); to.Hops < MaxHops {
				asked[to.ID]++
			}
		}
	}
	// Children per chunk: (members-1)/members on average, with a deviation of
	// sqrt((Fanout-1)/chunks), about: 2 %.
	mean := float64(chunks) * (members - 1) / members
	for _, m := range c.members {
		if n := float64(asked[m.ID]); n < .85*mean || n > 1.15*mean {
			t.Errorf("%s is asked for %.0f chunks, the mean is %.0f", m.ID, n, mean)
		}
	}
}

// In one view there is one root for each chunk, and everybody is a few hops below it.
func TestOneRootAndShallowTrees(t *testing.T) {
	c := newCluster([]int{200})
	w := world{groups: map[string]*Group{}, dead: map[string]bool{}, asked: map[string]int{}, has: map[have]bool{}}
	for _, m := range c.members {
		w.groups[m.ID] = c.group(t, m, 8, everybody)
	}
	for i := range 50 {
		for _, m := range c.members {
			w.fetch(m.ID, digest(i), blockdev.Prefetch, 0, nil)
		}
	}
	if w.asked["supernode"] != 50 {
		t.Errorf("the supernode was asked %d times for 50 chunks", w.asked["supernode"])
	}
	if w.hops > 5 {
		t.Errorf("a request was forwarded %d times among 200 members", w.hops)
	}
}

func TestViewsThatAreRefused(t *testing.T) {
	m := Member{ID: "a", Zone: "z", Cell: 1}
	other := Member{ID: "b", Zone: "z", Cell: 2}
	for name, v := range map[string]View{
		"twice":           {Zone: "z", Cell: 1, Members: []Member{m, m}},
		"no ID":           {Zone: "z", Cell: 1, Members: []Member{{Zone: "z", Cell: 1}}},
		"another cell":    {Zone: "z", Cell: 1, Members: []Member{m, other}},
		"gateway at home": {Zone: "z", Cell: 1, Members: []Member{m}, Gateways: []Member{{ID: "c", Zone: "z", Cell: 1}}},
		"too many":        {Zone: "z", Cell: 1, Members: make([]Member, MaxMembers+1)},
	} {
		if _, err := NewTable(v); !errors.Is(err, blockdev.ErrCorrupt) {
			t.Errorf("%s: got %v, want an error that wraps ErrCorrupt", name, err)
		}
	}
	if _, err := NewTable(View{Zone: "z", Cell: 1, Members: []Member{m}, Gateways: []Member{other}}); err != nil {
		t.Errorf("a good view: %v", err)
	}
}

func TestDecisionsDoNotAllocate(t *testing.T) {
	c := newCluster([]int{256, 256}, []int{256})
	g := c.group(t, c.members[3], 8, everybody)
	i := 0
	if n := testing.AllocsPerRun(1000, func() {
		i++
		a := AskKey(Key(mix(uint64(i))), blockdev.Demand, 0)
		to := g.Next(&a, 0)
		g.Report(&a, to, Missing, 0, time.Millisecond, 0)
		g.Next(&a, 0)
	}); n != 0 {
		t.Errorf("%v allocations per decision", n)
	}
}

// nth and highest agree with sorting.
func TestSelection(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	for range 2000 {
		n := 1 + r.IntN(300)
		g := Group{book: &Book{scratch: make([]uint64, 2*n)}}
		s := g.book.scratch[:n]
		for i := range s {
			s[i] = pack(r.Uint64(), i)
			if r.IntN(50) == 0 {
				s[i] = pack(uint64(r.IntN(3))<<60, i)
			}
		}
		want := append([]uint64(nil), s...)
		descending(want)
		k := r.IntN(n)
		if got := nth(g.highest(s, k+1), k); got != want[k] {
			t.Fatalf("number %d of %d: got %x, want %x", k, n, got, want[k])
		}
	}
}
