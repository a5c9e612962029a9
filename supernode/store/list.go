package store

import (
	"slices"
	"time"
)

// Entry is a layer that is stored, as List has it.
type Entry struct {
	LayerRecord
	Used time.Time // when it was asked for last
}

// List returns all layers, in no order. It counts as no use of them.
func (s *Store) List() []Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Entry, 0, len(s.layers))
	for l, r := range s.layers {
		e := Entry{LayerRecord: LayerRecord{Layer: l, Size: r.Size, DiffID: r.DiffID, Origins: slices.Clone(r.Origins)}}
		if d := s.diffs[r.DiffID]; d != nil {
			e.Used = time.Unix(0, d.used)
		}
		out = append(out, e)
	}
	return out
}
