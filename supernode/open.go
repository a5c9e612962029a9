package supernode

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/access"
	"github.com/shoalfs/shoal/supernode/ingest"
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
		if img.Grant, err = s.grant(peer, img.Manifest, ref.Name()); err != nil {
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
	if err := s.reg.Allowed(ref); err != nil {
		return nil, err // what is stored of it, too
	}
	v, err := s.mayOpen(ctx, peer, ref, req)
	if err != nil {
		return nil, err
	}
	m, err := s.reg.Resolve(ctx, req)
	if v.Public && req.Credential != (blockdev.Credential{}) && errors.Is(err, blockdev.ErrUnauthorized) {
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
		img, err := s.collect(ctx, peer, m, req, v)
		again := errors.Is(err, errGone) && round < maxRounds
		if !again {
			if err != nil {
				return nil, named(req.Ref, err)
			}
			if len(req.Only) == 0 {
				s.seen.add(m)
				s.profiles.HandOut(peer, img)
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
var errGone = errors.New("the store removed it before the answer")

// collect makes sure that all layers are stored and may be handed out, and then
// reads their indexes.
func (s *Supernode) collect(ctx context.Context, from string, m *registry.Manifest, req blockdev.ImageRequest, v access.Verdict) (*blockdev.Image, error) {
	watch := serial(req.Progress)
	var uses uses
	defer uses.end()
	g, gctx := errgroup.WithContext(ctx)
	begun := map[blockdev.Digest]bool{}
	for _, l := range m.Layers {
		if begun[l.Digest] {
			continue
		}
		begun[l.Digest] = true
		g.Go(func() error {
			return s.ensure(gctx, wanted{from: from, m: m, l: l, cred: req.Credential, public: v.Public, stored: req.Stored, watch: watch,
				ready: func() { uses.add(s.leases.take(l.DiffID)) }})
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	img := &blockdev.Image{Ref: req.Ref, Manifest: m.Digest}
	var total int64
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
			if total += int64(len(e.data)); req.Admit != nil {
				if err := req.Admit(total); err != nil {
					return nil, err
				}
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
// may be handed out on the word of the image's repository. Its errors name the
// layer, and nothing that the image does not say itself.
func (s *Supernode) ensure(ctx context.Context, r wanted) error {
	l, watch := r.l, r.watch
	open := s.openLayer(r)
	for turn := 0; turn < maxTurns; turn++ {
		rec, err := s.store.Layer(l.Digest)
		if errors.Is(err, blockdev.ErrNotFound) {
			rec, err = s.obtain(ctx, r, open)
		}
		if err != nil {
			return err
		}
		if !provenFor(rec, r.m) {
			// Also whether the layer has the DiffID that the image says is told to
			// those alone who may have it.
			if err := s.prove(ctx, r, open); err == nil || errors.Is(err, errGone) {
				continue
			} else if ctx.Err() != nil {
				return fmt.Errorf("layer %s: waiting for it: %w", l.Digest, ctx.Err())
			} else {
				return fmt.Errorf("layer %s: registry %s does not show that repository %s has it: %w", l.Digest, r.m.Host, r.m.Repository, err)
			}
		}
		if rec.DiffID != l.DiffID {
			s.log.Warn("an image config is wrong about a layer's DiffID", "image", r.m.Ref, "layer", l.Digest, "says", l.DiffID, "is", rec.DiffID)
			return fmt.Errorf("layer %s: the image config says that its DiffID is %s, and the layer has another: %w", l.Digest, l.DiffID, blockdev.ErrCorrupt)
		}
		r.ready()
		if watch != nil {
			watch(blockdev.Progress{Layer: l.Digest, Done: l.Size, Total: l.Size, Stage: blockdev.StageStored})
		}
		return nil
	}
	return fmt.Errorf("layer %s: the store removes it before nodes can use it: %w", l.Digest, blockdev.ErrUnavailable)
}

// ingestLayer fetches and stores a layer, or joins those who do.
func (s *Supernode) ingestLayer(ctx context.Context, r wanted, open ingest.Open) (store.LayerRecord, error) {
	m, l, watch := r.m, r.l, r.watch
	key := r.key()
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
	flight := fmt.Sprint(m.Host, " ", l.Digest, " ", l.Size)
	s.metrics.begin(flight)
	rec, err := s.ingest.Layer(ctx, ingest.Layer{Ref: m.Ref, Digest: l.Digest, Size: l.Size, MediaType: l.MediaType,
		DiffID: l.DiffID, Host: m.Host, Origin: originOf(m), Open: open}, report)
	if took, last := s.metrics.end(flight, err); last && ctx.Err() == nil {
		if err != nil {
			s.log.Warn("layer not stored", "image", m.Ref, "error", err)
		} else {
			s.log.Info("layer stored", "image", m.Ref, "layer", l.Digest, "bytes", l.Size, "took", took)
		}
	}
	if err == nil {
		s.failed.worked(key)
	} else if ctx.Err() == nil {
		s.failed.note(key, err)
	}
	return rec, err
}

// openLayer returns the function that streams a layer from its registry.
func (s *Supernode) openLayer(r wanted) ingest.Open {
	return func(ctx context.Context, offset int64) (io.ReadCloser, error) {
		rc, err := s.reg.Fetch(ctx, r.m, r.l, r.cred, offset)
		if r.public && r.cred != (blockdev.Credential{}) && errors.Is(err, blockdev.ErrUnauthorized) {
			rc, err = s.reg.Fetch(ctx, r.m, r.l, blockdev.Credential{}, offset)
		}
		var e *registry.Error
		if errors.As(err, &e) {
			short := *e // the caller names image and layer
			short.Ref = ""
			err = &short
		}
		return rc, err
	}
}
