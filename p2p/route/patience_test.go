package route

import (
	"testing"
	"time"
)

// TestPatienceComesBack: a link that was full makes a node wait longer, and some
// hundreds of good answers later it is as quick to go elsewhere as before.
func TestPatienceComesBack(t *testing.T) {
	b := NewBook(BookOptions{})
	learn := func(n int, took time.Duration) (giveUp time.Duration) {
		for range n {
			b.learn(true, took, 64<<10)
			_, giveUp = b.Patience(true)
		}
		return giveUp
	}
	before := learn(100, 2*time.Millisecond)
	if full := learn(64, time.Second); full < time.Second {
		t.Errorf("answers take 1 s, and it gives up after %v", full)
	}
	if after := learn(1000, 2*time.Millisecond); after != before {
		t.Errorf("it gives up after %v, and after %v as long as a link was full and 1000 answers later", before, after)
	}
}
