package swarm

import (
	"context"
	"fmt"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/exchange"
)

// Images returns what hands out indexes of store: a supernode that has lost a
// layer gets it back so.
func (s *Swarm) Images(store Store) exchange.Images { return &images{s, store} }

type images struct {
	s     *Swarm
	store Store
}

// OpenImageFor implements exchange.Images: of the image with the request's Manifest
// it gives the layers whose DiffIDs are in Only. Whoever is in the image's group
// has been given them before. No other error than blockdev.ErrNotFound says why
// there is nothing.
func (im *images) OpenImageFor(ctx context.Context, from string, req blockdev.ImageRequest) (*blockdev.Image, error) {
	id, err := peer.Decode(from)
	if err != nil {
		return nil, fmt.Errorf("peer %q: %w", from, err)
	}
	if err := im.s.cfg.Groups.Allowed(ctx, req.Manifest, id); err != nil {
		im.s.metrics.refused.Inc()
		return nil, fmt.Errorf("not here: %w", blockdev.ErrNotFound)
	}
	img := &blockdev.Image{Ref: req.Ref, Manifest: req.Manifest}
	for _, diff := range req.Only {
		if !slices.Contains(im.s.cfg.Groups.Groups(diff), req.Manifest) {
			return nil, fmt.Errorf("diff %s is not one of the image's here: %w", diff, blockdev.ErrNotFound)
		}
		enc, err := im.store.EncodedIndex(diff)
		if err != nil {
			return nil, err
		}
		img.Layers = append(img.Layers, blockdev.Layer{DiffID: diff, Index: enc})
	}
	if len(img.Layers) == 0 {
		return nil, fmt.Errorf("no layer is asked for, and a node gives single layers only: %w", blockdev.ErrUnsupported)
	}
	return img, nil
}
