package supernode

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/access"
	"github.com/shoalfs/shoal/supernode/layers"
)

const (
	// maxRounds is how often an image is gone through again because something was
	// evicted, or found damaged, between the look for it and the use of it.
	maxRounds = 3
	// relayFrom is from how many bytes of indexes a node is sent to other nodes for
	// them: less is sent sooner than a connection is made.
	relayFrom = 32 << 10
)

// FetchIndexesFor is image.Source's FetchIndexes on behalf of a peer. It takes
// as long as it takes to fetch what is not stored yet; if ctx ends before that,
// the work goes on, for the next one that asks. Errors wrap those of blockdev or
// the context's, and name the image and the cause.
func (s *Supernode) FetchIndexesFor(ctx context.Context, peer string, req image.Request) (img *image.Image, err error) {
	start := time.Now()
	err = s.requests.do(ctx, req.Ref, func(ctx context.Context) error {
		img, err = s.image(ctx, peer, req)
		return err
	})
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
			s.relay(ctx, peer, img)
		}
	}
	return img, nil
}

// FetchIndexes implements image.Source for the process that the supernode
// lives in.
func (s *Supernode) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	return s.FetchIndexesFor(ctx, "", req)
}

func (s *Supernode) image(ctx context.Context, peer string, req image.Request) (*image.Image, error) {
	ref, err := registry.ParseReference(req.Ref)
	if err != nil {
		return nil, err
	}
	if err := s.registry.Allowed(ref); err != nil {
		return nil, err // what is stored of it, too
	}
	v, err := s.mayOpen(ctx, peer, ref, req)
	if err != nil {
		return nil, err
	}
	var m *registry.Manifest
	err = v.Try(req.Credential, func(c image.Credential) (err error) {
		req.Credential = c
		m, err = s.registry.Resolve(ctx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	if m, err = only(m, req.Only); err != nil {
		return nil, err
	}
	for round := 1; ; round++ {
		img, err := s.collect(ctx, peer, m, req, v)
		if errors.Is(err, layers.ErrGone) && round < maxRounds {
			continue
		}
		if err != nil {
			return nil, named(req.Ref, err)
		}
		if len(req.Only) == 0 {
			s.stock.Seen(m)
			s.profiles.HandOut(peer, img)
		}
		return img, nil
	}
}

// mayOpen says whether a peer may have an image's indexes. A sibling has asked the
// registry itself.
func (s *Supernode) mayOpen(ctx context.Context, peer string, ref registry.Reference, req image.Request) (access.Verdict, error) {
	if s.layers.Sibling(peer) != "" {
		return access.Verdict{Public: true}, nil
	}
	if len(req.Only) > 0 || req.Stored {
		return access.Verdict{}, fmt.Errorf("%s: only supernodes ask for single layers: %w", req.Ref, blockdev.ErrUnauthorized)
	}
	return s.access.Allow(ctx, peer, ref, req)
}

// only reduces an image to the layers that are asked for.
func only(m *registry.Manifest, wanted []blockdev.Digest) (*registry.Manifest, error) {
	if len(wanted) == 0 {
		return m, nil
	}
	part := *m
	part.Layers = nil
	for _, l := range m.Layers {
		if slices.Contains(wanted, l.Digest) {
			part.Layers = append(part.Layers, l)
		}
	}
	if len(part.Layers) == 0 {
		return nil, fmt.Errorf("%s has none of the requested layers: %w", m.Ref, blockdev.ErrNotFound)
	}
	return &part, nil
}

// named puts the reference in front of errors that do not have it.
func named(ref string, err error) error {
	if strings.Contains(err.Error(), ref) {
		return err
	}
	return fmt.Errorf("%s: %w", ref, err)
}

// collect makes sure that all layers are stored and may be handed out, and then
// reads their indexes. An image does not evict its own layers meanwhile.
func (s *Supernode) collect(ctx context.Context, peer string, m *registry.Manifest, req image.Request, v access.Verdict) (*image.Image, error) {
	watch := serial(req.Progress)
	held := make([]func(), len(m.Layers))
	defer func() {
		for _, release := range held {
			if release != nil {
				release()
			}
		}
	}()
	g, gctx := errgroup.WithContext(ctx)
	begun := map[blockdev.Digest]bool{}
	for i, l := range m.Layers {
		if begun[l.Digest] {
			continue
		}
		begun[l.Digest] = true
		g.Go(func() (err error) {
			held[i], err = s.layers.Ensure(gctx, layers.Request{From: peer, Manifest: m, Layer: l, Credential: req.Credential, Verdict: v, Stored: req.Stored, Watch: watch})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	img := &image.Image{Ref: req.Ref, Manifest: m.Digest}
	var total int64
	for _, l := range m.Layers {
		bl := image.Layer{Digest: l.Digest, Size: l.Size, DiffID: l.DiffID}
		if !slices.Contains(req.Have, l.Digest) {
			e, err := s.indexes.get(ctx, l.DiffID)
			if errors.Is(err, blockdev.ErrNotFound) || errors.Is(err, blockdev.ErrCorrupt) {
				// The store forgets what it finds damaged.
				return nil, fmt.Errorf("layer %s: %w: %w: %w", l.Digest, layers.ErrGone, blockdev.ErrUnavailable, err)
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
func serial(watch func(image.Progress)) func(image.Progress) {
	if watch == nil {
		return nil
	}
	var mu sync.Mutex
	return func(p image.Progress) {
		mu.Lock()
		defer mu.Unlock()
		watch(p)
	}
}

// relay takes the indexes out of an answer if there are nodes that have them, and
// names these. A thousand nodes that begin at once would have the indexes alone fill
// the supernode's link for some images' worth of time.
func (s *Supernode) relay(ctx context.Context, peer string, img *image.Image) {
	size := 0
	for i := range img.Layers {
		size += len(img.Layers[i].Index)
	}
	if s.relays == nil || size < relayFrom {
		return
	}
	relays := s.relays(ctx, peer, img.Manifest)
	if len(relays) == 0 {
		return
	}
	s.metrics.relayed.Inc()
	img.Relays = relays
	for i := range img.Layers {
		l := &img.Layers[i]
		l.IndexSize, l.Index = int64(len(l.Index)), nil
	}
}
