package supernode

import (
	"slices"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/lru"
	"github.com/shoalfs/shoal/internal/registry"
)

// seen remembers the images that were asked for last.
type seen struct {
	mu  sync.Mutex
	lru *lru.Map[seenID, *registry.Manifest]
}

const maxSeen = 1000

type seenID struct {
	ref      string
	manifest blockdev.Digest
}

func newSeen() *seen {
	return &seen{lru: lru.New[seenID, *registry.Manifest](maxSeen)}
}

func (s *seen) add(m *registry.Manifest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lru.Add(seenID{m.Ref, m.Digest}, m)
}

// forget drops what is known by a name.
func (s *seen) forget(ref string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range s.lru.Keys() {
		if id.ref == ref {
			s.lru.Remove(id)
		}
	}
}

// all are the images, the last one first.
func (s *seen) all() []*registry.Manifest {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.lru.Values()
	slices.Reverse(all)
	return all
}
