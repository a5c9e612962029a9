package supernode

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/supernode/ingest"
	"github.com/shoalfs/shoal/supernode/registry"
	"github.com/shoalfs/shoal/supernode/store"
)

// OpenImageFor is blockdev.ImageSource's OpenImage on behalf of a peer. It takes
// as long as it takes to fetch what is not stored yet; if ctx ends before that,
// the work goes on, for the next one who asks. Errors wrap those of blockdev or
// the context's, and name the image and the cause.
func (s *Supernode) OpenImageFor(ctx context.Context, peer string, req blockdev.ImageRequest) (*blockdev.Image, error) {
	start := time.Now()
	img, err := s.open(ctx, peer, req)
	s.metrics.image(err, time.Since(start))
	if err != nil {
		return nil, err
	}
	if s.grant != nil && peer != "" {
		ref, err := registry.ParseReference(req.Ref)
		if err != nil {
			return nil, err
		}
		if img.Grant, err = s.grant(peer, img.Manifest, ref.Host); err != nil {
			return nil, fmt.Errorf("%.300s: %w", req.Ref, err)
		}
		if req.Relay {
			s.relayed(ctx, peer, img)
		}
	}
	return img, nil
}

// OpenImage implements blockdev.ImageSource for the process that the supernode
// lives in.
func (s *Supernode) OpenImage(ctx context.Context, req blockdev.ImageRequest) (*blockdev.Image, error) {
	return s.OpenImageFor(ctx, "", req)
}

// maxRounds is how often an image is gone through again because something was
// evicted, or found damaged, between the look for it and the use of it.
const maxRounds = 3

func (s *Supernode) open(ctx context.Context, peer string, req blockdev.ImageRequest) (*blockdev.Image, error) {
	ctx, end, err := s.begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("%.300s: %w", req.Ref, err)
	}
	defer end()
	img, err := s.image(ctx, peer, req)
	if err != nil && s.ctx.Err() != nil {
		return nil, fmt.Errorf("%.300s: %w", req.Ref, errStopping)
	}
	return img, err
}

func (s *Supernode) image(ctx context.Context, peer string, req blockdev.ImageRequest) (*blockdev.Image, error) {
	ref, err := registry.ParseReference(req.Ref)
	if err != nil {
		return nil, err
	}
	v, err := s.mayOpen(ctx, peer, ref, req)
	if err != nil {
		return nil, err
	}
	m, err := s.reg.Resolve(ctx, req)
	if v.public && req.Credential != (blockdev.Credential{}) && errors.Is(err, blockdev.ErrUnauthorized) {
		// A credential that has expired does not keep anybody from what is public.
		req.Credential = blockdev.Credential{}
		m, err = s.reg.Resolve(ctx, req)
	}
	if err != nil {
		return nil, err
	}
	if m, err = only(m, req.Only); err != nil {
		return nil, err
	}
	for round := 1; ; round++ {
		for _, l := range m.Layers {
			s.leases.take(l.DiffID)
		}
		img, err := s.collect(ctx, peer, m, req, v)
		again := errors.Is(err, errGone) && round < maxRounds
		if !again {
			if err != nil {
				return nil, named(req.Ref, err)
			}
			if len(req.Only) == 0 {
				s.seen.add(m)
				s.profiles.handOut(peer, img)
			}
			return img, nil
		}
	}
}

// named puts the reference in front of errors that do not have it.
func named(ref string, err error) error {
	if strings.Contains(err.Error(), ref) {
		return err
	}
	return fmt.Errorf("%s: %w", ref, err)
}

// errGone: an index is not there any more that was there a moment ago.
var errGone = errors.New("removed from the store meanwhile")

// collect makes sure that all layers are stored and may be handed out, and then
// reads their indexes.
func (s *Supernode) collect(ctx context.Context, from string, m *registry.Manifest, req blockdev.ImageRequest, v verdict) (*blockdev.Image, error) {
	watch := serial(req.Progress)
	g, gctx := errgroup.WithContext(ctx)
	begun := map[blockdev.Digest]bool{}
	for _, l := range m.Layers {
		if begun[l.Digest] {
			continue
		}
		begun[l.Digest] = true
		g.Go(func() error {
			return s.ensure(gctx, wanted{from: from, m: m, l: l, cred: req.Credential, public: v.public, stored: req.Stored, watch: watch})
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	img := &blockdev.Image{Ref: req.Ref, Manifest: m.Digest}
	for _, l := range m.Layers {
		bl := blockdev.Layer{Digest: l.Digest, Size: l.Size, DiffID: l.DiffID}
		if !slices.Contains(req.Have, l.Digest) {
			e, err := s.indexes.get(ctx, l.DiffID)
			if errors.Is(err, blockdev.ErrNotFound) || errors.Is(err, blockdev.ErrCorrupt) {
				// The store forgets what it finds damaged.
				return nil, fmt.Errorf("layer %s: %w: %w: %w", l.Digest, errGone, blockdev.ErrUnavailable, err)
			}
			if err != nil {
				return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
			}
			bl.Index, bl.IndexDigest = e.data, e.sum
		}
		img.Layers = append(img.Layers, bl)
	}
	return img, nil
}

// serial makes calls of watch come one at a time; layers report side by side.
func serial(watch func(blockdev.Progress)) func(blockdev.Progress) {
	if watch == nil {
		return nil
	}
	var mu sync.Mutex
	return func(p blockdev.Progress) {
		mu.Lock()
		defer mu.Unlock()
		watch(p)
	}
}

// maxTurns bounds how often a layer is looked for again that others evict, or
// that somebody else failed to prove.
const maxTurns = 4

// ensure returns nil when the layer is stored, is what the image says it is, and
// may be handed out on the word of the image's registry. Its errors name the
// layer.
func (s *Supernode) ensure(ctx context.Context, r wanted) error {
	m, l, watch := r.m, r.l, r.watch
	open := s.openLayer(m, l, r.cred, r.public)
	for turn := 0; turn < maxTurns; turn++ {
		rec, err := s.store.Layer(l.Digest)
		if errors.Is(err, blockdev.ErrNotFound) {
			rec, err = s.obtain(ctx, r, open)
		}
		if err != nil {
			return err
		}
		if rec.DiffID != l.DiffID {
			return fmt.Errorf("layer %s: the image config says that its DiffID is %s, but it is %s: %w", l.Digest, l.DiffID, rec.DiffID, blockdev.ErrCorrupt)
		}
		if s.mayHandOut(rec, m.Host) {
			if watch != nil {
				watch(blockdev.Progress{Layer: l.Digest, Done: l.Size, Total: l.Size, Stage: blockdev.StageStored})
			}
			return nil
		}
		led, err := s.verifyLayer(ctx, m, l, open, watch)
		switch {
		case err == nil, errors.Is(err, errGone):
		case ctx.Err() != nil:
			return fmt.Errorf("layer %s: waiting for it: %w", l.Digest, ctx.Err())
		case led || !errors.Is(err, blockdev.ErrUnauthorized):
			return fmt.Errorf("layer %s is stored, but came from another registry, and %s does not prove that it has it: %w", l.Digest, m.Host, err)
			// Else it was somebody else's credential; ours decides.
		}
	}
	return fmt.Errorf("layer %s: not stored for long enough to be used: %w", l.Digest, blockdev.ErrUnavailable)
}

// ingestLayer fetches and stores a layer, or joins those who do.
func (s *Supernode) ingestLayer(ctx context.Context, m *registry.Manifest, l registry.Layer, open ingest.Open, watch func(blockdev.Progress)) (store.LayerRecord, error) {
	key := m.Host + " " + l.Digest.String() + " " + l.DiffID.String()
	if err := s.failed.recall(key); err != nil {
		return store.LayerRecord{}, err
	}
	var report func(ingest.Progress)
	if watch != nil {
		report = func(p ingest.Progress) {
			if p.Stage != ingest.StageStored { // it is not handed out yet
				watch(blockdev.Progress{Layer: l.Digest, Done: p.Fetched, Total: l.Size, Stage: blockdev.Stage(p.Stage.String())})
			}
		}
	}
	s.metrics.begin(key)
	rec, err := s.ingest.Layer(ctx, ingest.Layer{Ref: m.Ref, Digest: l.Digest, Size: l.Size, MediaType: l.MediaType,
		DiffID: l.DiffID, Origin: m.Host, Open: open}, report)
	if took, last := s.metrics.end(key, err); last && ctx.Err() == nil {
		if err != nil {
			s.log.Warn("layer not stored", "error", err)
		} else {
			s.log.Info("layer stored", "image", m.Ref, "layer", l.Digest, "bytes", l.Size, "took", took)
		}
	}
	if err != nil && ctx.Err() == nil {
		s.failed.note(key, err)
	}
	return rec, err
}

// mayHandOut is the rule that a registry's word counts for what came from it
// only: digests are no secret, so anybody can list anybody's layers.
func (s *Supernode) mayHandOut(rec store.LayerRecord, host string) bool {
	return slices.Contains(rec.Origins, host) || s.trusted[host]
}

// openLayer returns the function that streams a layer from its registry.
func (s *Supernode) openLayer(m *registry.Manifest, l registry.Layer, cred blockdev.Credential, public bool) ingest.Open {
	return func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		rc, err := s.reg.Fetch(ctx, m, l, cred, offset)
		if public && cred != (blockdev.Credential{}) && errors.Is(err, blockdev.ErrUnauthorized) {
			rc, err = s.reg.Fetch(ctx, m, l, blockdev.Credential{}, offset)
		}
		var e *registry.Error
		if errors.As(err, &e) {
			short := *e // whoever asks names image and layer
			short.Ref = ""
			err = &short
		}
		return rc, err
	}
}

// verifyLayer fetches a layer that is stored already from one more registry,
// only to see that this registry really has it and lets us have it. led: this
// call did it, not one that it joined.
func (s *Supernode) verifyLayer(ctx context.Context, m *registry.Manifest, l registry.Layer, open ingest.Open, watch func(blockdev.Progress)) (led bool, err error) {
	key := m.Host + " " + l.Digest.String()
	if err := s.failed.recall(key); err != nil {
		return true, err
	}
	return s.flights.do(ctx, key, watch, func(ctx context.Context, fl *flight) error {
		err := s.verify(ctx, m, l, open, fl)
		if err != nil {
			s.log.Warn("layer is stored, but came from another registry, and this one does not prove that it has it",
				"image", m.Ref, "layer", l.Digest, "registry", m.Host, "error", err)
			s.failed.note(key, err)
		}
		return err
	})
}

func (s *Supernode) verify(ctx context.Context, m *registry.Manifest, l registry.Layer, open ingest.Open, fl *flight) error {
	select {
	case s.verifying <- struct{}{}:
		defer func() { <-s.verifying }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if rec, err := s.store.Layer(l.Digest); err == nil && s.mayHandOut(rec, m.Host) {
		return nil // proven since the caller looked
	}
	rc, err := open(ctx, 0)
	if err != nil {
		return err
	}
	h := &counted{Hash: sha256.New(), fl: fl, p: blockdev.Progress{Layer: l.Digest, Total: l.Size, Stage: blockdev.StageVerifying}}
	_, err = io.Copy(h, rc)
	if cerr := rc.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if d := blockdev.Digest(h.Sum(nil)); d != l.Digest {
		return fmt.Errorf("registry %s sends %s in its place: %w", m.Host, d, blockdev.ErrCorrupt)
	}
	if err := s.store.AddOrigin(l.Digest, m.Host); errors.Is(err, blockdev.ErrNotFound) {
		return fmt.Errorf("%w: %w", errGone, blockdev.ErrUnavailable)
	} else if err != nil {
		return err
	}
	return nil
}

// counted is a hash that reports how far it is.
type counted struct {
	hash.Hash
	fl   *flight
	p    blockdev.Progress
	last int64
}

// reportStep is after how many bytes progress is reported again.
const reportStep = 1 << 20

// Write implements io.Writer.
func (c *counted) Write(b []byte) (int, error) {
	c.p.Done += int64(len(b))
	if c.p.Done-c.last >= reportStep || c.last == 0 {
		c.last = c.p.Done
		c.fl.report(c.p)
	}
	return c.Hash.Write(b)
}
