package route_test

import (
	"fmt"
	"log"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/route"
)

// Example looks for a chunk as node b of four does. Its parent a does not have the chunk, nor
// does c, which is asked as one below b (hops 30: it must not ask others), so the supernode
// is asked.
func Example() {
	// A node has one Book, its history with all peers, and for each image a Group on top of
	// it, made again (cheaply) when a new View comes.
	book := route.NewBook(route.BookOptions{})
	table, err := route.NewTable(route.View{Members: []route.Member{{ID: "a"}, {ID: "b"}, {ID: "c"}, {ID: "d"}}})
	if err != nil {
		log.Fatal(err)
	}
	group := route.NewGroup(route.Member{ID: "b"}, table, book)

	// An Ask is the search for one chunk; it remembers the peers that were tried. Time comes
	// in as a value.
	now := time.Duration(0)
	ask := route.NewAsk(blockdev.Sum([]byte("a chunk")), blockdev.Demand, 0)
	for {
		t := group.Next(&ask, now)
		outcome := route.Missing
		switch t.Kind {
		case route.Peer:
			fmt.Printf("ask %s, hops %d\n", t.ID, t.Hops)
		case route.Supernode:
			fmt.Println("ask the supernode")
			outcome = route.OK
		case route.Later:
			now += t.Wait // all were busy
			continue
		case route.Nobody:
			fmt.Println("the supernode failed, too")
			return
		}
		took := time.Millisecond
		now += took
		group.Report(&ask, t, outcome, now, took, 64<<10) // before the next call of Next
		if outcome == route.OK {
			return
		}
	}
	// Output:
	// ask a, hops 1
	// ask c, hops 30
	// ask the supernode
}
