package prefetch

import (
	"context"
	"sync"
)

// requestShare is which part of the window one request is for: a request is on its way
// while the answers to the others come.
const requestShare = 4

// Inflight bounds what prefetch has under way in the whole Cache: bytes that were asked
// for and have not come, chunk by chunk. The chunks of a request come from many
// nodes, some of them late; a node that waited for the last one before it asked for more
// would leave its link idle.
type Inflight struct {
	Size func() int64 // bytes

	mu    sync.Mutex
	used  int64
	freed chan struct{} // closed, and made again, when used falls
}

func newInflight(size func() int64) *Inflight {
	return &Inflight{Size: size, freed: make(chan struct{})}
}

// room waits until a request may be sent, and says for how many bytes: limit at most.
func (w *Inflight) room(ctx context.Context, limit int64) (int64, error) {
	for {
		size := w.Size()
		n := min(limit, size/requestShare)
		w.mu.Lock()
		ok, freed := w.used == 0 || w.used+n <= size, w.freed
		w.mu.Unlock()
		if ok {
			return n, nil
		}
		select {
		case <-freed:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// Take counts n bytes that are asked for.
func (w *Inflight) Take(n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.used += n
}

// Free takes n bytes out that have come, or will not.
func (w *Inflight) Free(n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.used -= n
	close(w.freed)
	w.freed = make(chan struct{})
}
