package route

import (
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// A root that asks the one below in vain asks less often, and as often as before
// once it gets an answer.
func TestBelow(t *testing.T) {
	self, other := Member{ID: "a"}, Member{ID: "b"}
	table, err := NewTable(View{Version: 1, Members: []Member{self, other}})
	if err != nil {
		t.Fatal(err)
	}
	g := NewGroup(self, table, NewBook(BookOptions{}))
	chunk := 0
	// ask asks for n chunks that this node is the root of, and returns how often
	// the other one was asked.
	ask := func(n int, o Outcome) (asked int) {
		for n > 0 {
			chunk++
			digest := blockdev.Sum([]byte{byte(chunk), byte(chunk >> 8)})
			if rank(KeyOf(digest), hashID("a")) < rank(KeyOf(digest), hashID("b")) {
				continue // the other one is the root
			}
			n--
			a := NewAsk(digest, blockdev.Prefetch, 0)
			target := g.Next(&a, time.Second)
			if target.Kind == Peer {
				asked++
				g.Report(&a, target, o, time.Second, time.Millisecond, 1)
			}
		}
		return asked
	}
	if n := ask(vainLimit, Missing); n != vainLimit {
		t.Errorf("%d of %d asked at first", n, vainLimit)
	}
	if n := ask(10*vainTurns, Missing); n != 10 {
		t.Errorf("%d of %d asked after all of them were in vain", n, 10*vainTurns)
	}
	if n := ask(vainTurns, OK); n == 0 {
		t.Error("nobody was asked")
	}
	if n := ask(50, OK); n != 50 {
		t.Errorf("%d of 50 asked after one had an answer", n)
	}
}
