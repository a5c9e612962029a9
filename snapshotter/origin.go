package snapshotter

import (
	"context"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
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
func (s *Snapshotter) Origins(diff blockdev.Digest) ([]Origin, error) {
	list, err := s.records.images()
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
func (s *Snapshotter) Describe(diff blockdev.Digest) []any {
	found, err := s.Origins(diff)
	if err != nil || len(found) == 0 {
		return nil
	}
	return []any{"image", found[0].Ref, "layer", found[0].Digest}
}

// rewarmPause is for how long the outcome of a rewarming counts.
const rewarmPause = 2 * time.Second

// rewarming is one attempt to have the supernode get an image again.
type rewarming struct {
	done  chan struct{} // closed when err and ended are set
	err   error
	ended time.Time
}

// Rewarm has the supernode get a diff again that it has lost or evicted, by opening
// an image that has it. Callers at the same time share one attempt, which goes on
// when they leave, and its outcome counts for a moment. Errors are those of
// image.Source.
func (s *Snapshotter) Rewarm(ctx context.Context, diff blockdev.Digest) error {
	found, err := s.Origins(diff)
	if err != nil {
		return err
	}
	if s.cfg.Images == nil {
		return fmt.Errorf("no supernode is configured: %w", blockdev.ErrUnavailable)
	}
	err = fmt.Errorf("no image on this node has diff %s: %w", diff, blockdev.ErrNotFound)
	for _, o := range found {
		w := s.startRewarm(o)
		if w == nil {
			return errClosing
		}
		select {
		case <-w.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err = w.err; err == nil {
			return nil
		}
	}
	return err
}

// startRewarm returns the attempt for an image; nil: the snapshotter is closed.
func (s *Snapshotter) startRewarm(o Origin) *rewarming {
	key := o.Manifest.Hex() + o.Ref
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.base.Err() != nil {
		return nil
	}
	if w := s.rewarmings[key]; w != nil {
		select {
		case <-w.done:
			if time.Since(w.ended) < rewarmPause {
				return w
			}
		default:
			return w
		}
	}
	w := &rewarming{done: make(chan struct{})}
	s.rewarmings[key] = w
	s.bg.Go(func() {
		s.log.Info("the supernode does not have a layer any more; this node asks it to fetch the layer again", "image", o.Ref, "layer", o.Digest)
		w.err = s.rewarm(o)
		w.ended = time.Now()
		close(w.done)
		time.AfterFunc(rewarmPause, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.rewarmings[key] == w {
				delete(s.rewarmings, key)
			}
		})
	})
	return w
}

func (s *Snapshotter) rewarm(o Origin) error {
	ctx, cancel := context.WithTimeout(s.base, s.cfg.IndexTimeout)
	defer cancel()
	req := image.Request{Ref: o.Ref, Manifest: o.Manifest, Platform: s.cfg.Platform}
	var err error
	if req.Credential, err = s.SourceCredential(ctx, o.Ref); err != nil {
		return err
	}
	for _, l := range o.layers {
		req.Have = append(req.Have, l.Digest) // the indexes are here
	}
	_, err = s.cfg.Images.FetchIndexes(ctx, req)
	return err
}
