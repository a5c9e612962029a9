package supernode

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/store"
)

// Stock is what is stored, as an operator sees it and disposes of it. All methods may be
// called from any goroutine.
type Stock struct {
	store    *store.Store
	indexes  *indexes
	registry *registry.Client
	requests requests
	seen     *seen
	pinned   *pinned
}

func openStock(dir string, s *Supernode) (*Stock, error) {
	p, err := openPinned(dir, s.store.Pin)
	return &Stock{store: s.store, indexes: s.indexes, registry: s.registry, requests: s.requests, seen: newSeen(), pinned: p}, err
}

// Seen notes an image that a peer has asked for, and got.
func (s *Stock) Seen(m *registry.Manifest) { s.seen.add(m) }

// StoredImage is an image that a peer has asked for and that is still stored.
type StoredImage struct {
	Ref      string
	Manifest blockdev.Digest
	Layers   []registry.Layer
}

// Images lists images that were asked for since the start, the last one first,
// as far as all of their layers are stored.
func (s *Stock) Images() []StoredImage {
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

// StoredLayer is a layer in the store, as an operator sees it.
type StoredLayer struct {
	Layer, DiffID blockdev.Digest
	Size          int64     // bytes of the layer at its registry
	Used          time.Time // when it was asked for last
	Origins       []string  // the repositories that have shown to have it
	// Images are those that are known to have it: pinned ones, and of the others those
	// that were asked for since the start.
	Images []string
	Pinned bool
}

// Layers lists all layers that are stored, the largest first.
func (s *Stock) Layers() []StoredLayer {
	images := map[blockdev.Digest][]string{}
	for _, m := range s.seen.all() {
		for _, l := range m.Layers {
			images[l.Digest] = append(images[l.Digest], m.Ref)
		}
	}
	var out []StoredLayer
	for _, e := range s.store.List() {
		pins := s.pinned.of(e.DiffID)
		names := slices.Concat(images[e.Layer], pins)
		slices.Sort(names)
		out = append(out, StoredLayer{Layer: e.Layer, DiffID: e.DiffID, Size: e.Size, Used: e.Used, Origins: e.Origins,
			Images: slices.Compact(names), Pinned: len(pins) > 0})
	}
	slices.SortFunc(out, func(a, b StoredLayer) int {
		return cmp.Or(cmp.Compare(b.Size, a.Size), bytes.Compare(a.Layer[:], b.Layer[:]))
	})
	return out
}

// RemoveDigest removes the layer or diff with a digest from the store, with all
// layers that hold the same diff, and returns them.
func (s *Stock) RemoveDigest(d blockdev.Digest) ([]blockdev.Digest, error) {
	var layers []blockdev.Digest
	var diff blockdev.Digest
	for _, e := range s.store.List() {
		if e.Layer == d || e.DiffID == d {
			diff = e.DiffID
		}
	}
	for _, e := range s.store.List() {
		if e.DiffID == diff {
			layers = append(layers, e.Layer)
		}
	}
	if len(layers) == 0 {
		return nil, fmt.Errorf("%s is not a stored layer or diff: %w", d, blockdev.ErrNotFound)
	}
	return layers, s.removeDiff(diff)
}

func (s *Stock) removeDiff(diff blockdev.Digest) error {
	if pins := s.pinned.of(diff); len(pins) > 0 {
		return fmt.Errorf("diff %s: %w as part of %s: unpin the image first", diff, ErrPinned, pins[0])
	}
	return s.store.Remove(diff)
}

// Remove removes the layers of an image that no other known image has, and
// returns them. Nodes that read them get them from the image's registry again.
func (s *Stock) Remove(ctx context.Context, req image.Request) ([]blockdev.Digest, error) {
	m, err := s.known(ctx, req)
	if err != nil {
		return nil, err
	}
	others := map[blockdev.Digest]bool{}
	for _, o := range s.seen.all() {
		if o.Ref != m.Ref {
			for _, l := range o.Layers {
				others[l.DiffID] = true
			}
		}
	}
	stored := map[blockdev.Digest]bool{}
	for _, e := range s.store.List() {
		stored[e.DiffID] = true
	}
	for _, l := range m.Layers {
		if pins := s.pinned.of(l.DiffID); slices.Contains(pins, req.Ref) {
			return nil, fmt.Errorf("%s: %w: unpin it first", req.Ref, ErrPinned)
		}
	}
	var gone []blockdev.Digest
	for _, l := range m.Layers {
		if others[l.DiffID] || !stored[l.DiffID] || len(s.pinned.of(l.DiffID)) > 0 {
			continue
		}
		if err := s.removeDiff(l.DiffID); err != nil {
			return gone, err
		}
		delete(stored, l.DiffID)
		gone = append(gone, l.Digest)
	}
	s.seen.forget(m.Ref)
	return gone, nil
}

// known finds out what layers an image has, from those that were asked for, or else
// from what is kept of its registry, or from that.
func (s *Stock) known(ctx context.Context, req image.Request) (*registry.Manifest, error) {
	for _, m := range s.seen.all() {
		if m.Ref == req.Ref {
			return m, nil
		}
	}
	var m *registry.Manifest
	err := s.requests.do(ctx, req.Ref, func(ctx context.Context) (err error) {
		m, err = s.registry.Resolve(ctx, req)
		return err
	})
	return m, err
}

// Pin keeps the layers of a stored image from being evicted and removed until
// Unpin, over restarts. Its error wraps blockdev.ErrNotFound if not all of the
// image is stored, and blockdev.ErrNoSpace if what is pinned would take too much.
func (s *Stock) Pin(ctx context.Context, req image.Request) error {
	m, err := s.known(ctx, req)
	if err != nil {
		return err
	}
	im := pinnedImage{Ref: req.Ref}
	for _, l := range m.Layers {
		release := s.store.Pin(l.DiffID) // until all of them are
		defer release()
		e, err := s.indexes.get(ctx, l.DiffID)
		if errors.Is(err, blockdev.ErrNotFound) {
			return fmt.Errorf("%s: its layer %s is not stored; bring the image with `shoal prefetch`, then pin it: %w", req.Ref, l.Digest, blockdev.ErrNotFound)
		}
		if err != nil {
			return fmt.Errorf("%s: layer %s: %w", req.Ref, l.Digest, err)
		}
		ix, err := index.Decode(e.data)
		if err != nil {
			return fmt.Errorf("%s: layer %s: %w", req.Ref, l.Digest, err)
		}
		im.Diffs = append(im.Diffs, pinnedDiff{l.DiffID, ix.DiffSize})
	}
	return s.pinned.set(im, s.store.Stats().Quota/pinnedShare)
}

// Unpin takes a Pin back. Its error wraps blockdev.ErrNotFound if the image
// is not pinned.
func (s *Stock) Unpin(ref string) error {
	had, err := s.pinned.drop(ref)
	if err == nil && !had {
		return fmt.Errorf("%s is not pinned: %w", ref, blockdev.ErrNotFound)
	}
	return err
}
