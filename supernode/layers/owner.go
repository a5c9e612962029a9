package layers

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/supernode/store"
)

// order sorts all supernodes for a diff, its owner first.
func (sibs siblings) order(self peer.ID, diff blockdev.Digest) []peer.ID {
	ids := []peer.ID{self}
	for id := range sibs {
		ids = append(ids, id)
	}
	return route.Order(diff, ids)
}

// obtain gets a layer that is not stored: from its owner, or the next one that can
// be reached; if that is this supernode, from whichever sibling has it, from a node
// that has it if none has, and from the registry if there is none.
//
// A request between supernodes is never passed on; all that follows from one are
// questions for what is stored. So there are no circles.
func (l *Layers) obtain(ctx context.Context, r Request) (store.LayerRecord, error) {
	sibs := *l.siblings.Load()
	if len(sibs) == 0 {
		return l.fetch(ctx, r)
	}
	if r.Stored {
		return store.LayerRecord{}, fmt.Errorf("layer %s: not stored here: %w", r.Layer.Digest, blockdev.ErrNotFound)
	}
	order := sibs.order(l.cfg.Self, r.Layer.DiffID)
	from := l.Sibling(r.From)
	for _, id := range order {
		if id == l.cfg.Self {
			break
		}
		if from != "" && id != from {
			continue // the sibling has found that one to be gone, or is to hear from it itself
		}
		// A supernode that asks, and comes before this one, has the layer or none has.
		rec, err := l.copyLayer(ctx, r, id, sibs[id], id == from)
		if err == nil || !elsewhere(ctx, err) {
			return rec, err
		}
		if id == from {
			return rec, err
		}
		if others, say := l.quiet.Say("owner", string(id), l.cfg.Now()); say {
			l.cfg.Log.Info("the supernode that a layer belongs to does not answer; going on without this supernode", "layer", r.Layer.Digest, "supernode", id, "error", err, "others", others)
		}
	}
	for _, id := range order {
		// Also the one that asks: it may have fetched the layer when this
		// supernode could not be reached, and want it to be here, too.
		if id == l.cfg.Self || sibs[id].Status() != nil {
			continue
		}
		if rec, err := l.copyLayer(ctx, r, id, sibs[id], true); err == nil {
			return rec, nil
		} else if ctx.Err() != nil {
			return rec, err
		}
	}
	rec, err := l.fetch(ctx, r)
	if err == nil {
		l.replicate(r, sibs, order)
	}
	return rec, err
}

// elsewhere says whether another supernode may do what this one could not.
func elsewhere(ctx context.Context, err error) bool {
	return ctx.Err() == nil && (errors.Is(err, blockdev.ErrUnavailable) || errors.Is(err, blockdev.ErrNotFound) || errors.Is(err, context.DeadlineExceeded))
}

// replicate has the next supernode in the order copy a layer that has just been
// ingested here, so that what dies with this one is what is in flight.
func (l *Layers) replicate(r Request, sibs siblings, order []peer.ID) {
	next := peer.ID("")
	at := slices.Index(order, l.cfg.Self)
	for i := 1; i < len(order) && next == ""; i++ {
		if id := order[(at+i)%len(order)]; sibs[id].Status() == nil {
			next = id
		}
	}
	if next == "" {
		return
	}
	r.Watch = nil // it outlives the caller that waits
	key := "replicate " + string(next) + " " + r.key() + " " + registry.CredentialHash(r.Credential)
	a, err := l.begin(key, outlives, func(ctx context.Context, _ *progress) error {
		asking, cancel := context.WithTimeout(ctx, replicateTimeout)
		defer cancel()
		_, err := sibs[next].FetchIndexes(asking, l.layerRequest(r, false))
		if err != nil && ctx.Err() == nil {
			l.cfg.Log.Warn("another supernode could not copy a layer; only this supernode has it", "layer", r.Layer.Digest, "error", err)
		}
		return err
	})
	if err == nil {
		a.Leave() // no request waits for it
	}
}
