package supernode

import (
	"container/list"
	"slices"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry"
)

// StoredImage is an image that somebody has asked for and that is still stored.
type StoredImage struct {
	Ref      string
	Manifest blockdev.Digest
	Layers   []registry.Layer
}

// Images lists images that were asked for since the start, the last one first,
// as far as all of their layers are stored.
func (s *Supernode) Images() []StoredImage {
	var out []StoredImage
	// A look counts as a use in the store, so the looks come in the order of use.
next:
	for _, m := range slices.Backward(s.seen.all()) {
		for _, l := range m.Layers {
			if _, err := s.store.Layer(l.Digest); err != nil {
				continue next
			}
		}
		out = append(out, StoredImage{Ref: m.Ref, Manifest: m.Digest, Layers: m.Layers})
	}
	slices.Reverse(out)
	return out
}

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
