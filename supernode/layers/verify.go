package layers

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/store"
)

// originOf is what the layers of an image have as their origin.
func originOf(m *registry.Manifest) string { return m.Host + "/" + m.Repository }

func provenFor(rec store.LayerRecord, m *registry.Manifest) bool {
	return slices.Contains(rec.Origins, originOf(m))
}

// believed says whether the host's word is enough for a layer.
func (l *Layers) believed(rec store.LayerRecord, host string) bool {
	return l.trusted[host] || slices.ContainsFunc(rec.Origins, func(o string) bool {
		return o == host || strings.HasPrefix(o, host+"/")
	})
}

// prove has the image's registry show that the repository has a layer that is
// stored, and that this credential may have it.
func (l *Layers) prove(ctx context.Context, r Request) error {
	key := "prove " + r.key()
	if err := l.failed.recall(key); err != nil {
		return err
	}
	return l.once(ctx, key+" "+registry.CredentialHash(r.Credential), atLeast(r.Layer.Size), r.Watch, func(ctx context.Context, p *progress) error {
		err := l.show(ctx, r, p)
		if err != nil && ctx.Err() == nil && !errors.Is(err, ErrGone) {
			l.cfg.Log.Warn("a layer is stored, but the image's registry does not show that this repository has it; nodes do not get the layer for this image",
				"image", r.Manifest.Ref, "layer", r.Layer.Digest, "error", err)
			l.failed.note(key, err)
		}
		return err
	})
}

// atLeast is for work with that many bytes, which have to come at restoreRate if
// nobody waits.
func atLeast(size int64) flight.Policy { return flight.Policy{Least: timeFor(size)} }

// timeFor is how long that many bytes may take.
func timeFor(size int64) time.Duration {
	return restoreTime + time.Duration(size/restoreRate)*time.Second
}

func (l *Layers) show(ctx context.Context, r Request, p *progress) error {
	rec, err := l.cfg.Store.Layer(r.Layer.Digest)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrGone, blockdev.ErrUnavailable)
	case !l.believed(rec, r.Manifest.Host):
		err = l.verify(ctx, r, p)
	default:
		err = r.Verdict.Try(r.Credential, func(c image.Credential) error {
			return l.cfg.Registry.HasBlob(ctx, r.Manifest, r.Layer, c)
		})
		if registry.Downgraded(err) {
			// Only the bytes themselves are proof, from each sender.
			err = l.verify(ctx, r, p)
		}
	}
	if err != nil {
		return err
	}
	if err := l.cfg.Store.AddOrigin(r.Layer.Digest, originOf(r.Manifest)); errors.Is(err, blockdev.ErrNotFound) {
		return fmt.Errorf("%w: %w", ErrGone, blockdev.ErrUnavailable)
	} else if err != nil {
		return err
	}
	return nil
}

// verify fetches and hashes a layer that is stored already, only to see that a
// registry that has not sent it yet really has it.
func (l *Layers) verify(ctx context.Context, r Request, p *progress) error {
	release, err := l.verifying.Take(ctx, r.Manifest.Host)
	if err != nil {
		return err
	}
	defer release()
	if rec, err := l.cfg.Store.Layer(r.Layer.Digest); err == nil && provenFor(rec, r.Manifest) {
		return nil // shown by others since
	}
	rc, err := l.opener(r)(ctx, 0)
	if err != nil {
		return err
	}
	h := &counted{Hash: sha256.New(), to: p, p: image.Progress{Layer: r.Layer.Digest, Total: r.Layer.Size, Stage: image.StageVerifying}}
	_, err = io.Copy(h, rc)
	if cerr := rc.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if d := blockdev.Digest(h.Sum(nil)); d != r.Layer.Digest {
		return fmt.Errorf("registry %s sends %s instead: %w", r.Manifest.Host, d, blockdev.ErrCorrupt)
	}
	return nil
}

// counted is a hash that reports how far it is.
type counted struct {
	hash.Hash
	to   *progress
	p    image.Progress
	last int64
}

// reportStep is after how many bytes progress is reported again.
const reportStep = 1 << 20

// Write implements io.Writer.
func (c *counted) Write(b []byte) (int, error) {
	c.p.Done += int64(len(b))
	if c.p.Done-c.last >= reportStep || c.last == 0 {
		c.last = c.p.Done
		c.to.Report(c.p)
	}
	return c.Hash.Write(b)
}
