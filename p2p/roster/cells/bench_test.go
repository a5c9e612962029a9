package cells

import (
	"fmt"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

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
