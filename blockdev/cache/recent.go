package cache

import "sync"

// recentBytes bounds the chunks that are kept in memory since they could not be
// written.
const recentBytes = 16 << 20

// recent keeps chunks that could not be written for a short while: a program
// that reads on, in pieces smaller than a chunk, would else have the same chunk
// fetched several times. The chunks are flights that are over and still listed
// in their diff.
type recent struct {
	mu    sync.Mutex
	bytes int
	fifo  []kept
}

type kept struct {
	diff  *local
	bytes int
	drop  func() // takes the flight off the diff's list
}

// add keeps a chunk of a diff, and drops those that came first.
func (r *recent) add(diff *local, bytes int, drop func()) {
	r.mu.Lock()
	r.fifo = append(r.fifo, kept{diff, bytes, drop})
	r.bytes += bytes
	n := 0
	for r.bytes > recentBytes {
		r.bytes -= r.fifo[n].bytes
		n++
	}
	gone := r.fifo[:n:n]
	r.fifo = r.fifo[n:]
	r.mu.Unlock()
	for _, k := range gone {
		k.drop()
	}
	clear(gone)
}

// forget lets go of what it has of a diff that is no more.
func (r *recent) forget(diff *local) {
	r.mu.Lock()
	defer r.mu.Unlock()
	left := make([]kept, 0, len(r.fifo))
	for _, k := range r.fifo {
		if k.diff != diff {
			left = append(left, k)
		} else {
			r.bytes -= k.bytes
		}
	}
	r.fifo = left
}
