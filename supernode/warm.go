package supernode

import (
	"container/list"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/supernode/registry"
)

// Stage is what is being done with a layer.
type Stage string

// The stages. Layers that are not stored go through the first four, those that
// are stored already and came from another registry are verified.
const (
	// StageWaiting: for others to be done, or for room.
	StageWaiting Stage = "waiting"
	// StageFetching: it comes from the registry, and is hashed, unpacked and
	// stored as it comes.
	StageFetching Stage = "fetching"
	// StageUnpacking: all of it is there, the rest is being unpacked.
	StageUnpacking Stage = "unpacking"
	// StageStoring: its index is written.
	StageStoring Stage = "storing"
	// StageVerifying: it is fetched once more, only to see that this registry has
	// it, too.
	StageVerifying Stage = "verifying"
	// StageStored: done.
	StageStored Stage = "stored"
)

// Progress says where a layer is.
type Progress struct {
	Layer blockdev.Digest
	// Done and Total are compressed bytes.
	Done, Total int64
	Stage       Stage
}

// Warm makes the supernode have an image, and tells progress how that goes, one
// call at a time; progress may be nil and must not block. It is for whoever runs
// this process: access is checked with req.Credential as for a peer, but nothing
// is handed out. nil: everything is stored, every byte of it checked.
func (s *Supernode) Warm(ctx context.Context, req blockdev.ImageRequest, progress func(Progress)) error {
	start := time.Now()
	_, err := s.open(ctx, "", req, progress)
	s.metrics.image(err, time.Since(start))
	return err
}

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

func (s *seen) all() []*registry.Manifest {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*registry.Manifest
	for el := s.lru.Front(); el != nil; el = el.Next() {
		out = append(out, el.Value.(*registry.Manifest))
	}
	return out
}
