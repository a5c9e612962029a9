package blockdev

import (
	"errors"
	"fmt"
	"sync"
)

// Rest is what is left of a request while several Sources are asked for it, one after
// the other or at the same time. Its methods may be called from any goroutine.
type Rest struct {
	req     Request
	deliver Deliver

	mu      sync.Mutex // held while deliver runs: one call at a time
	got     []bool
	left    int
	refused error
}

// NewRest returns all of a request. deliver gets each chunk once, unless it finds
// ErrCorrupt.
func NewRest(req Request, deliver Deliver) *Rest {
	return &Rest{req: req, deliver: deliver, got: make([]bool, len(req.Chunks)), left: len(req.Chunks)}
}

// Left is how many chunks were not delivered.
func (r *Rest) Left() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.left
}

// Refused is the error of deliver that has ended the request: none that a Source has
// caused.
func (r *Rest) Refused() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.refused
}

// Ask returns a request for what is left, to be sent to one Source, and the Deliver for
// what this Source answers.
func (r *Rest) Ask() (Request, Deliver) {
	r.mu.Lock()
	defer r.mu.Unlock()
	req, at := r.req, make([]int, 0, r.left)
	req.Chunks = make([]Chunk, 0, r.left)
	for i, got := range r.got {
		if !got {
			at = append(at, i)
			req.Chunks = append(req.Chunks, r.req.Chunks[i])
		}
	}
	return req, func(k int, data []byte) error {
		if k < 0 || k >= len(at) {
			return fmt.Errorf("delivered chunk number %d of a request for %d", k, len(at))
		}
		return r.take(at[k], data)
	}
}

func (r *Rest) take(i int, data []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.refused != nil:
		return r.refused
	case r.got[i]:
		return r.req.Chunks[i].Check(data) // deliver does not see it, and nil means that it is right
	}
	err := r.deliver(i, data)
	switch {
	case err == nil:
		r.got[i] = true
		r.left--
	case !errors.Is(err, ErrCorrupt):
		r.refused = err
	}
	return err
}
