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
	"sync/atomic"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/ingest"
	"github.com/shoalfs/shoal/supernode/slots"
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
// stored, as rec, and that this credential may have it.
func (l *Layers) prove(ctx context.Context, r Request, rec store.LayerRecord) error {
	key := "prove " + r.key()
	if err := l.failed.recall(key); err != nil {
		return err
	}
	return l.once(ctx, key+" "+registry.CredentialHash(r.Credential), alone(rec, r), r.Watch, func(ctx context.Context, p *progress) error {
		err := l.show(ctx, r, p)
		if err != nil && ctx.Err() == nil && !errors.Is(err, ErrGone) {
			if others, say := l.quiet.Say("not shown", r.Manifest.Ref, l.cfg.Now()); say {
				l.cfg.Log.Warn("a layer is stored, but the image's registry does not show that this repository has it; nodes do not get the layer for this image",
					"image", r.Manifest.Ref, "layer", r.Layer.Digest, "error", err, "others", others)
			}
			l.failed.note(key, err)
		}
		return err
	})
}

// alone is for a verification that no request waits for: the bytes have to come at
// restoreRate then. What only the manifest says about their number would give it days.
func alone(rec store.LayerRecord, r Request) flight.Policy {
	return flight.Policy{Least: timeFor(min(rec.Size, r.Layer.Size))}
}

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
// registry that has not sent it yet really has it. It takes as many turns as those of an
// ingest do, and each goes on with the byte that the last one has not got.
func (l *Layers) verify(ctx context.Context, r Request, p *progress) error {
	h := &counted{Hash: sha256.New(), to: p, p: image.Progress{Layer: r.Layer.Digest, Total: r.Layer.Size, Stage: image.StageVerifying}}
	return slots.Turns(ctx, func(ctx context.Context, n int) error { return l.compare(ctx, r, h, n) }, func() {
		p.Report(image.Progress{Layer: r.Layer.Digest, Done: h.bytes.Load(), Total: r.Layer.Size, Stage: image.StageWaiting})
		l.cfg.Log.Warn("a registry sends a layer slowly while other layers wait; the comparison with the stored layer goes on after them",
			"image", r.Manifest.Ref, "layer", r.Layer.Digest, "at", h.bytes.Load(), "size", r.Layer.Size)
	})
}

// compare is one turn of a verification.
func (l *Layers) compare(ctx context.Context, r Request, h *counted, turn int) error {
	release, err := l.verifying.TakeRanked(ctx, r.Manifest.Host, turn)
	if err != nil {
		return err
	}
	defer release()
	rec, err := l.cfg.Store.Layer(r.Layer.Digest)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrGone, blockdev.ErrUnavailable)
	}
	if provenFor(rec, r.Manifest) {
		return nil // shown by others since
	}
	// Bytes that the layer does not have are no reason to keep the place. They do not end the
	// verification either: of a layer that a node has given back, the size is a manifest's word.
	moved := func() int64 { return min(h.bytes.Load(), rec.Size) }
	ctx, stop := l.ingest.Pace().Keep(ctx, moved, func() bool { return l.verifying.Waiting() > 0 })
	defer stop()
	if err := h.rest(ctx, l.opener(r)); errors.Is(context.Cause(ctx), slots.ErrYielded) && err != nil {
		return slots.ErrYielded
	} else if err != nil {
		return err
	}
	switch d := blockdev.Digest(h.Sum(nil)); {
	case d == r.Layer.Digest:
		return nil
	case turn > 0:
		// The seam may be the cause: a registry may answer a range request with something
		// else. The next request begins again.
		return fmt.Errorf("registry %s sends %s instead, in %d parts: %w", r.Manifest.Host, d, turn+1, blockdev.ErrUnavailable)
	default:
		return fmt.Errorf("registry %s sends %s instead: %w", r.Manifest.Host, d, blockdev.ErrCorrupt)
	}
}

// counted is a hash that reports how far it is.
type counted struct {
	hash.Hash
	bytes atomic.Int64 // hashed
	to    *progress
	p     image.Progress
	last  int64
}

// rest fetches and hashes what has not been hashed yet.
func (c *counted) rest(ctx context.Context, open ingest.Open) error {
	rc, err := open(ctx, c.bytes.Load())
	if err != nil {
		return err
	}
	c.last = 0 // the stage is another one again
	_, err = io.Copy(c, rc)
	if cerr := rc.Close(); err == nil {
		err = cerr
	}
	return err
}

// reportStep is after how many bytes progress is reported again.
const reportStep = 1 << 20

// Write implements io.Writer.
func (c *counted) Write(b []byte) (int, error) {
	c.p.Done = c.bytes.Add(int64(len(b)))
	if c.p.Done-c.last >= reportStep || c.last == 0 {
		c.last = c.p.Done
		c.to.Report(c.p)
	}
	return c.Hash.Write(b)
}
