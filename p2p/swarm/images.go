package swarm

import (
	"context"
	"fmt"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/exchange"
)

// Images returns what hands out indexes of store, and those that this node is opening:
// to nodes that the supernode sends here, and to a supernode that has lost a layer and
// gets it back so.
func (s *Swarm) Images(store Store) exchange.Images { return &images{s, store} }

type images struct {
	s     *Swarm
	store Store
}

// FetchIndexesFor implements exchange.Images: of the image with the request's Manifest
// it gives the layer whose DiffID is in Only: one, so that a request costs one
// index of memory. A node in the image's group has been given it before; a node that is
// not hears blockdev.ErrNotFound, as for what is not here.
func (im *images) FetchIndexesFor(ctx context.Context, from string, req image.Request) (*image.Image, error) {
	id, err := peer.Decode(from)
	if err != nil {
		return nil, fmt.Errorf("peer %q: %w", from, err)
	}
	if err := im.s.cfg.Groups.Allowed(ctx, req.Manifest, id); err != nil {
		im.s.metrics.refused.Inc()
		return nil, fmt.Errorf("not here: %w", blockdev.ErrNotFound)
	}
	if len(req.Only) != 1 {
		return nil, fmt.Errorf("%d layers are requested, and a node sends one at a time: %w", len(req.Only), blockdev.ErrUnsupported)
	}
	diff := req.Only[0]
	if !slices.Contains(im.s.cfg.Groups.Groups(diff), req.Manifest) {
		return nil, fmt.Errorf("diff %s is not a layer of this image on this node: %w", diff, blockdev.ErrNotFound)
	}
	enc, err := im.s.opened.get(ctx, diff)
	if err == nil && enc == nil {
		enc, err = im.store.EncodedIndex(diff)
	}
	if err != nil {
		return nil, err
	}
	return &image.Image{Ref: req.Ref, Manifest: req.Manifest, Layers: []image.Layer{{DiffID: diff, Index: enc}}}, nil
}
