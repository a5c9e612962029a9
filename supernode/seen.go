package supernode

import (
	"container/list"
	"sync"

	"github.com/shoalfs/shoal/internal/registry"
)

// seen remembers the images that were asked for last.
type seen struct {
	mu   sync.Mutex
	byID map[string]*list.Element
	lru  *list.List // of *registry.Manifest, the last one first
}

const maxSeen = 1000

func newSeen() *seen { return &seen{byID: map[string]*list.Element{}, lru: list.New()} }

func seenID(m *registry.Manifest) string { return m.Ref + " " + m.Digest.String() }

func (s *seen) add(m *registry.Manifest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if el := s.byID[seenID(m)]; el != nil {
		s.lru.MoveToFront(el)
		return
	}
	s.byID[seenID(m)] = s.lru.PushFront(m)
	if s.lru.Len() > maxSeen {
		old := s.lru.Remove(s.lru.Back()).(*registry.Manifest)
		delete(s.byID, seenID(old))
	}
}

// forget drops what is known by a name.
func (s *seen) forget(ref string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, el := range s.byID {
		if el.Value.(*registry.Manifest).Ref == ref {
			s.lru.Remove(el)
			delete(s.byID, id)
		}
	}
}

func (s *seen) all() []*registry.Manifest {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*registry.Manifest
	for el := s.lru.Front(); el != nil; el = el.Next() {
		out = append(out, el.Value.(*registry.Manifest))
	}
	return out
}
