package store

import (
	"sync"

	"github.com/shoalfs/shoal/blockdev"
)

// holds are the chunks that running ingests count on, and those that a running transaction
// deletes. Each side announces itself before it looks, so that an ingest never counts on a
// chunk that goes.
type holds struct {
	mu      sync.Mutex
	held    map[blockdev.Digest]int      // by running ingests
	doomed  map[blockdev.Digest]int      // by a running transaction
	orphans map[blockdev.Digest]struct{} // without a reference, left since they were held
}

func newHolds() *holds {
	return &holds{held: map[blockdev.Digest]int{}, doomed: map[blockdev.Digest]int{}, orphans: map[blockdev.Digest]struct{}{}}
}

// hold makes sure that d stays until release, if it is there. False: it is about to go.
func (h *holds) hold(d blockdev.Digest) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.doomed[d] > 0 {
		return false
	}
	h.held[d]++
	return true
}

func (h *holds) release(d blockdev.Digest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held[d]--; h.held[d] <= 0 {
		delete(h.held, d)
	}
}

// doom announces that d is about to be deleted, so that no ingest counts on it
// from now on. False: one does already.
func (h *holds) doom(d blockdev.Digest) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held[d] > 0 {
		return false
	}
	h.doomed[d]++
	return true
}

// spare ends what doom has announced: the chunks are gone, or stay.
func (h *holds) spare(chunks []blockdev.Digest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, d := range chunks {
		if h.doomed[d]--; h.doomed[d] == 0 {
			delete(h.doomed, d)
		}
	}
}

// orphan notes a chunk that has no reference and cannot go now.
func (h *holds) orphan(d blockdev.Digest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.orphans[d] = struct{}{}
}

// loose are the orphans that no ingest holds any more.
func (h *holds) loose() (chunks []blockdev.Digest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for d := range h.orphans {
		if h.held[d] == 0 {
			chunks = append(chunks, d)
		}
	}
	return chunks
}

// settled says that these are orphans no more.
func (h *holds) settled(chunks []blockdev.Digest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, d := range chunks {
		delete(h.orphans, d)
	}
}
