package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// Chunk is a chunk as it is stored.
type Chunk struct {
	// Data is one zstd frame if Zstd is set, else the chunk itself. It belongs
	// to the caller.
	Data []byte
	Zstd bool
	// Length is that of the raw chunk, in bytes.
	Length uint32
}

// lookups bounds how often a chunk that moves under the reader is looked for.
const lookups = 4

// Chunk returns a chunk, also one of a running ingest. Errors wrap
// blockdev.ErrNotFound, or blockdev.ErrCorrupt: the chunk was damaged on disk,
// and the layers that have it are forgotten, to be ingested again.
func (s *Store) Chunk(ctx context.Context, d blockdev.Digest) (Chunk, error) {
	s.smaller.served.Store(time.Now().UnixNano())
	var failed extent
	var cause error
	for range lookups {
		if err := ctx.Err(); err != nil {
			return Chunk{}, err
		}
		// Sessions first: a session leaves the list only after its chunks
		// are in the database.
		r, data, ok := s.sessions.find(d)
		if !ok {
			var err error
			r, ok, err = s.db.chunk(d)
			if errors.Is(err, blockdev.ErrCorrupt) {
				s.damaged(map[blockdev.Digest]extent{d: {}})
			}
			if err != nil {
				return Chunk{}, fmt.Errorf("chunk %s: %w", d, err)
			}
			if !ok {
				return Chunk{}, fmt.Errorf("store: chunk %s: %w", d, blockdev.ErrNotFound)
			}
		}
		if r.damaged() {
			return Chunk{}, fmt.Errorf("store: chunk %s: damaged on disk; a request for its layer fetches it again: %w", d, blockdev.ErrCorrupt)
		}
		if cause != nil && r.extent == failed {
			// Still where it was, so it was not moved or evicted: damage.
			s.damaged(map[blockdev.Digest]extent{d: r.extent})
			return Chunk{}, fmt.Errorf("store: chunk %s: %w", d, cause)
		}
		if data == nil {
			data, cause = s.packs.read(r.extent, nil)
			if cause != nil {
				if !errors.Is(cause, blockdev.ErrCorrupt) {
					return Chunk{}, fmt.Errorf("store: chunk %s: %w", d, cause)
				}
				failed = r.extent
				continue
			}
		}
		return Chunk{Data: data, Zstd: r.flags&flagZstd != 0, Length: r.raw}, nil
	}
	return Chunk{}, fmt.Errorf("store: chunk %s: %w", d, blockdev.ErrNotFound)
}

// Index returns the encoded index of a diff and counts as a use of it. Errors
// wrap blockdev.ErrNotFound, or blockdev.ErrCorrupt: it was damaged on disk, and
// its layers are forgotten, to be ingested again.
func (s *Store) Index(ctx context.Context, diffID blockdev.Digest) ([]byte, error) {
	var failed extent
	var cause error
	for range lookups {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if !s.Touch(diffID) {
			break
		}
		r, ok, err := s.db.diff(diffID)
		if err == nil && !ok {
			break
		}
		if errors.Is(err, blockdev.ErrCorrupt) || (err == nil && cause != nil && r.Index == failed) {
			s.forgetLayers(diffID)
			return nil, fmt.Errorf("store: index of diff %s: %w", diffID, errors.Join(err, cause))
		}
		if err != nil {
			return nil, fmt.Errorf("store: index of diff %s: %w", diffID, err)
		}
		b, err := s.packs.read(r.Index, nil)
		if err == nil {
			return b, nil
		}
		if !errors.Is(err, blockdev.ErrCorrupt) {
			return nil, fmt.Errorf("store: index of diff %s: %w", diffID, err)
		}
		failed, cause = r.Index, err
	}
	return nil, fmt.Errorf("store: index of diff %s: %w", diffID, blockdev.ErrNotFound)
}

// Layer returns what is known about a published layer and counts as a use of
// its diff. The error wraps blockdev.ErrNotFound.
func (s *Store) Layer(layer blockdev.Digest) (LayerRecord, error) {
	r, ok := s.catalogue.use(layer)
	if !ok {
		return LayerRecord{}, fmt.Errorf("store: layer %s: %w", layer, blockdev.ErrNotFound)
	}
	return r.public(layer), nil
}

// List returns all layers, in no order. It counts as no use of them.
func (s *Store) List() []Entry { return s.catalogue.list() }

// AddOrigin notes one more origin that has shown that it has the layer. The error wraps blockdev.ErrNotFound if the
// store does not have the layer.
func (s *Store) AddOrigin(layer blockdev.Digest, origin string) error {
	return s.update(func(c *change) error {
		r, ok := s.catalogue.record(layer)
		if !ok {
			return fmt.Errorf("store: layer %s: %w", layer, blockdev.ErrNotFound)
		}
		r.Origins = mergeOrigins([]string{origin}, r.Origins)
		if err := c.putJSON(bucketLayers, layer, r); err != nil {
			return err
		}
		// In memory before the commit: if that fails, a restart asks again.
		s.catalogue.replace(layer, r)
		return nil
	})
}

// Pin keeps a diff from being evicted until release is called, once or more
// often. A diff that is not there may be pinned as well.
func (s *Store) Pin(diffID blockdev.Digest) (release func()) { return s.catalogue.pin(diffID) }

// Touch counts as a use of a diff. False: there is no such diff.
func (s *Store) Touch(diffID blockdev.Digest) bool { return s.catalogue.touch(diffID) }

// flushUses writes down the last uses that have changed.
func (s *Store) flushUses() error {
	uses := s.catalogue.unwritten()
	if len(uses) == 0 {
		return nil
	}
	return s.update(func(c *change) error {
		for id, used := range uses {
			r, ok, err := getDiff(c.tx, id)
			if err != nil || !ok {
				continue
			}
			r.Used = used
			if err := c.putJSON(bucketDiffs, id, r); err != nil {
				return err
			}
		}
		return nil
	})
}
