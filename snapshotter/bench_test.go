package snapshotter

import (
	"fmt"
	"testing"
)

// BenchmarkPull pulls and removes an image of ten layers: the snapshotter's own
// share of a lazy pull, with indexes and mounts that cost nothing.
func BenchmarkPull(b *testing.B) {
	n := newNode(b)
	var ls []layer
	for i := range 10 {
		ls = append(ls, newLayer(b, dir("d", 0o755), file(fmt.Sprintf("d/f%d", i))))
	}
	img := newImage("registry.test/x:1", ls...)
	n.images.publish(img)
	for b.Loop() {
		_, _, err := n.pull(bg, img)
		check(b, err)
		b.StopTimer()
		for i := len(ls) - 1; i >= 0; i-- {
			check(b, n.Remove(bg, img.chain(i)))
		}
		b.StartTimer()
	}
}

// BenchmarkPrepare makes a container's snapshot on an image of n lazy layers.
func BenchmarkPrepare(b *testing.B) {
	for _, layers := range []int{10, 127} {
		b.Run(fmt.Sprintf("layers=%d", layers), func(b *testing.B) {
			n := newNode(b)
			var ls []layer
			for i := range layers {
				ls = append(ls, newLayer(b, dir("d", 0o755), file(fmt.Sprintf("d/f%d", i))))
			}
			img := newImage("registry.test/x:1", ls...)
			n.images.publish(img)
			top, _, err := n.pull(bg, img)
			check(b, err)
			i := 0
			for b.Loop() {
				i++
				key := fmt.Sprint("c", i)
				must(n.Prepare(bg, key, top))(b)
				b.StopTimer()
				check(b, n.Remove(bg, key))
				b.StartTimer()
			}
		})
	}
}
