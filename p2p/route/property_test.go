package route

import (
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
}

func (w *world) fetch(id string, chunk blockdev.Digest, p blockdev.Priority, hops int, path []string) bool {
	for _, before := range path {
		if before == id {
			panic(fmt.Sprintf("circle: %v then %s", path, id))
		}
	}
	w.hops = max(w.hops, hops)
	g := w.groups[id]
	ask := NewAsk(chunk, p, hops)
	for range 1000 {
		t := g.Next(&ask, 0)
		switch t.Kind {
		case Supernode:
			w.asked["supernode"]++
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
			if w.fetch(t.ID, chunk, p, ask.Hops()+1, append(path, id)) {
				g.Report(&ask, t, OK, 0, time.Millisecond, 1)
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
		w := world{groups: map[string]*Group{}, dead: map[string]bool{}, asked: map[string]int{}}
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
