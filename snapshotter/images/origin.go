package images

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/flight"
)

// Origin is where a diff came from: a layer of an image on this node.
type Origin struct {
	// Ref and Manifest name the image.
	Ref      string
	Manifest blockdev.Digest
	Layer

	layers []Layer // all of the image
}

// Origins returns the layers of this node's images that are a diff.
func (c *Catalogue) Origins(diff blockdev.Digest) ([]Origin, error) {
	list, err := c.records.images()
	if err != nil {
		return nil, err
	}
	var found []Origin
	for _, img := range list {
		for _, l := range img.Layers {
			if l.DiffID == diff {
				found = append(found, Origin{Ref: img.Ref, Manifest: img.Manifest, Layer: l, layers: img.Layers})
				break
			}
		}
	}
	return found, nil
}

// Describe returns the image and the layer of a diff as attributes of a log line.
func (c *Catalogue) Describe(diff blockdev.Digest) []any {
	found, err := c.Origins(diff)
	if err != nil || len(found) == 0 {
		return nil
	}
	return []any{"image", found[0].Ref, "layer", found[0].Digest}
}

// rewarmPause is for how long the outcome of a rewarming counts.
const rewarmPause = 2 * time.Second

// rewarmings have the supernode get images again.
type rewarmings struct {
	opener  *opener
	flights *flight.Group[rewarmKey, struct{}]

	mu   sync.Mutex
	last map[rewarmKey]error // outcomes of the last rewarmPause
}

type rewarmKey struct {
	manifest blockdev.Digest
	ref      string
}

func newRewarmings(op *opener) *rewarmings {
	return &rewarmings{
		opener: op, flights: flight.New[rewarmKey, struct{}](flight.Policy{Outlives: true}, ErrClosed), last: make(map[rewarmKey]error),
	}
}

// Rewarm has the supernode get a diff again that it has lost or evicted, by opening
// an image that has it. Callers at the same time share one attempt, which goes on
// when they leave, and its outcome counts for a moment. Errors are those of
// image.Source.
func (c *Catalogue) Rewarm(ctx context.Context, diff blockdev.Digest) error {
	found, err := c.Origins(diff)
	if err != nil {
		return err
	}
	if c.cfg.Images == nil {
		return fmt.Errorf("no supernode is configured: %w", blockdev.ErrUnavailable)
	}
	err = fmt.Errorf("no image on this node has diff %s: %w", diff, blockdev.ErrNotFound)
	for _, o := range found {
		if err = c.rewarmings.rewarm(ctx, o); err == nil || ctx.Err() != nil {
			return err
		}
	}
	return err
}

// rewarm joins the attempt for an image, begins one, or returns how the last one ended
// if that was a moment ago.
func (rs *rewarmings) rewarm(ctx context.Context, o Origin) error {
	key := rewarmKey{o.Manifest, o.Ref}
	rs.mu.Lock()
	err, ok := rs.last[key]
	if ok {
		rs.mu.Unlock()
		return err
	}
	attempt, err := rs.flights.Join(key, func() (struct{}, flight.Work) {
		return struct{}{}, func(ctx context.Context) error {
			rs.opener.cfg.Log.Info("the supernode does not have a layer any more; this node asks it to fetch the layer again", "image", o.Ref, "layer", o.Digest)
			err := rs.ask(ctx, o)
			rs.mu.Lock()
			defer rs.mu.Unlock()
			rs.last[key] = err
			time.AfterFunc(rewarmPause, func() {
				rs.mu.Lock()
				defer rs.mu.Unlock()
				delete(rs.last, key)
			})
			return err
		}
	})
	rs.mu.Unlock()
	if err != nil {
		return err
	}
	return attempt.Wait(ctx)
}

func (rs *rewarmings) ask(ctx context.Context, o Origin) error {
	ctx, cancel := context.WithTimeout(ctx, rs.opener.cfg.IndexTimeout)
	defer cancel()
	req, err := rs.opener.again(ctx, o.Ref, o.Manifest)
	if err != nil {
		return err
	}
	for _, l := range o.layers {
		req.Have = append(req.Have, l.Digest) // the indexes are here
	}
	_, err = rs.opener.cfg.Images.FetchIndexes(ctx, req)
	return rs.opener.explain(err)
}
