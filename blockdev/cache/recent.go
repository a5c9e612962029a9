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
	d *Diff
	f *flight
}

// add takes a flight that is over, and lets those go that came first.
func (r *recent) add(d *Diff, f *flight) {
	r.mu.Lock()
	r.fifo = append(r.fifo, kept{d, f})
	r.bytes += len(f.mem)
	n := 0
	for r.bytes > recentBytes {
		r.bytes -= len(r.fifo[n].f.mem)
		n++
	}
	gone := r.fifo[:n:n]
	r.fifo = r.fifo[n:]
	r.mu.Unlock()
	for _, k := range gone {
		k.d.unlist(k.f)
	}
	clear(gone)
}

// forget drops what it has of a diff.
func (r *recent) forget(d *Diff) {
	r.mu.Lock()
	defer r.mu.Unlock()
	left := make([]kept, 0, len(r.fifo))
	for _, k := range r.fifo {
		if k.d != d {
			left = append(left, k)
		} else {
			r.bytes -= len(k.f.mem)
		}
	}
	r.fifo = left
}

// unlist takes a flight that is over out of the diff's list.
func (d *Diff) unlist(f *flight) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.flights[f.chunk] == f {
		delete(d.flights, f.chunk)
	}
}
