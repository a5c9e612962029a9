package layers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/ingest"
	"github.com/shoalfs/shoal/supernode/internal/outcome"
	"github.com/shoalfs/shoal/supernode/store"
)

// fromRegistry fetches and stores a layer, or joins those that do.
func (l *Layers) fromRegistry(ctx context.Context, r Request) (store.LayerRecord, error) {
	m, d := r.Manifest, r.Layer
	key := r.key()
	if err := l.failed.recall(key); err != nil {
		return store.LayerRecord{}, err
	}
	var report func(ingest.Progress)
	if r.Watch != nil {
		report = func(p ingest.Progress) {
			if p.Stage != image.StageStored { // it is not handed out yet
				r.Watch(image.Progress{Layer: d.Digest, Done: p.Fetched, Total: d.Size, Stage: p.Stage})
			}
		}
	}
	rec, err := l.ingest.Layer(ctx, ingest.Layer{Ref: m.Ref, Digest: d.Digest, Size: d.Size, MediaType: d.MediaType,
		DiffID: d.DiffID, Host: m.Host, Origin: originOf(m), Open: l.opener(r),
		Shows: fmt.Sprint(registry.CredentialHash(r.Credential), r.Verdict.Public)}, report)
	if err == nil {
		l.failed.worked(key)
	} else if ctx.Err() == nil {
		l.failed.note(key, err)
	}
	return rec, err
}

// ingested notes the end of an ingest.
func (l *Layers) ingested(d ingest.Layer, took time.Duration, err error) {
	l.metrics.ingests.WithLabelValues(outcome.Of(err)).Inc()
	switch {
	case err == nil:
		l.metrics.seconds.Observe(took.Seconds())
		l.cfg.Log.Info("layer stored", "image", d.Ref, "layer", d.Digest, "bytes", d.Size, "took", took)
	case !errors.Is(err, context.Canceled) && !errors.Is(err, ingest.ErrClosed):
		l.cfg.Log.Warn("layer not stored", "image", d.Ref, "layer", d.Digest, "error", err)
	}
}

// opener returns the function that streams a layer from its registry.
func (l *Layers) opener(r Request) ingest.Open {
	return func(ctx context.Context, offset int64) (rc io.ReadCloser, err error) {
		err = r.Verdict.Try(r.Credential, func(c image.Credential) (err error) {
			rc, err = l.cfg.Registry.Fetch(ctx, r.Manifest, r.Layer, c, offset)
			return err
		})
		var e *registry.Error
		if errors.As(err, &e) {
			short := *e // the caller names image and layer
			short.Ref = ""
			err = &short
			if registry.Limited(err) || short.RetryAfter() > 0 {
				err = limited{err}
			}
		}
		return rc, err
	}
}

// limited is a registry's error that is also an ingest.ErrLimited.
type limited struct{ error }

// Unwrap returns both.
func (e limited) Unwrap() []error { return []error{e.error, ingest.ErrLimited} }
