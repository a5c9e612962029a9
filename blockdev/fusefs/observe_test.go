package fusefs

import (
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// TestObserve: each read that is answered is told of once, with where its bytes were.
func TestObserve(t *testing.T) {
	const size = 1 << 20
	f := onDisk(t, 9, size)
	f.here = func(off int64, _ int) bool { return off < size/2 }
	f.from = blockdev.FromSupernode
	files := &memFiles{}
	files.put(idA, f)
	var mu sync.Mutex
	got := map[blockdev.Origin]int{}
	s := start(t, files, Options{Observe: func(from blockdev.Origin, took time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		got[from]++
		if took <= 0 || took > time.Hour {
			t.Errorf("a read took %v", took)
		}
	}})
	fd := openRaw(t, s.path(idA))
	within(t, "read", func() {
		for off := int64(0); off < size; off += size / 8 {
			if _, err := fd.ReadAt(make([]byte, 4096), off); err != nil {
				t.Error(err)
			}
		}
	})
	all := func() int {
		mu.Lock()
		defer mu.Unlock()
		return got[blockdev.FromLocal] + got[blockdev.FromSupernode]
	}
	within(t, "be told", func() {
		for all() < 8 { // the last answer is told of after it was sent
			time.Sleep(time.Millisecond)
		}
	})
	mu.Lock()
	defer mu.Unlock()
	if got[blockdev.FromLocal] != 4 || got[blockdev.FromSupernode] != 4 || len(got) != 2 {
		t.Errorf("8 reads were told of as %v", got)
	}
}
