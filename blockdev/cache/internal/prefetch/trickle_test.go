package prefetch

import (
	"testing"
	"time"
)

// TestTrickle: while demand reads go on, prefetch asks for what a slow link carries
// in a small part of the time, a chunk at least.
func TestTrickle(t *testing.T) {
	var tr Trickle
	if n := tr.bytes(time.Second); n != 1 {
		t.Errorf("%d bytes before anything is known", n)
	}
	tr.Note(1<<20, time.Second)
	if n := tr.bytes(time.Second); n != 1<<20/trickleShare {
		t.Errorf("%d bytes at 1 MiB/s", n)
	}
	tr.Note(0, time.Second) // a request that failed says nothing
	if n := tr.bytes(time.Second); n != 1<<20/trickleShare {
		t.Errorf("%d bytes after a failure", n)
	}
	tr.Note(1<<20, 0)
	if n := tr.bytes(time.Second); n < 1<<30 {
		t.Errorf("%d bytes where a request takes no time", n)
	}
}
