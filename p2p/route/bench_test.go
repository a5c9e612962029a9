package route

import (
	"fmt"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// One decision, in cells of several sizes, alone and as one of forty cells.
func BenchmarkNext(b *testing.B) {
	for _, c := range []struct{ cells, members int }{{1, 16}, {1, 64}, {1, 256}, {1, 1024}, {40, 256}} {
		b.Run(fmt.Sprintf("cells=%d/members=%d", c.cells, c.members), func(b *testing.B) {
			sizes := make([]int, c.cells)
			for i := range sizes {
				sizes[i] = c.members
			}
			all := newCluster(sizes)
			g := all.group(b, all.members[7], 8, everybody)
			keys := make([]Key, 4096)
			for i := range keys {
				keys[i] = KeyOf(digest(i))
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				a := AskKey(keys[i%len(keys)], blockdev.Prefetch, 0)
				g.Next(&a, 0)
			}
		})
	}
}
