package supernode

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/supernode/access"
	"github.com/shoalfs/shoal/supernode/ingest"
	"github.com/shoalfs/shoal/supernode/store"
)

// Sibling is another supernode of the same datacenter. It is trusted as this one
// is: with credentials, with who may read what, and with which index belongs to
// which layer.
type Sibling interface {
	blockdev.Source
	blockdev.ImageSource
	// Status returns nil if it can be reached.
	Status() error
}

const (
	// copyRequest is how many chunks are asked of a sibling at a time, and
	// copyStreams how many such requests are under way.
	copyRequest = 256
	copyStreams = 2
	// askTimeout bounds the question whether a sibling has a layer, and
	// replicateTimeout the copying of one by the next.
	askTimeout       = 10 * time.Second
	replicateTimeout = time.Hour
)

// wanted is what somebody wants of one layer.
type wanted struct {
	from   string // the peer
	m      *registry.Manifest
	l      registry.Layer
	cred   blockdev.Credential
	public bool
	stored bool // nothing is to be fetched
	watch  func(blockdev.Progress)
	ready  func() // called when it is stored and is what the image says
}

// mayOpen says whether a peer may have an image's indexes. A sibling has asked the
// registry itself.
func (s *Supernode) mayOpen(ctx context.Context, from string, ref registry.Reference, req blockdev.ImageRequest) (access.Verdict, error) {
	if s.sibling(from) != "" {
		return access.Verdict{Public: true}, nil
	}
	if len(req.Only) > 0 || req.Stored {
		return access.Verdict{}, fmt.Errorf("%s: only supernodes ask for single layers: %w", req.Ref, blockdev.ErrUnauthorized)
	}
	return s.access.Allow(ctx, from, ref, req)
}

// siblings are the other supernodes. They are replaced, and never changed.
type siblings map[peer.ID]Sibling

// SetSiblings changes Config.Siblings for requests that begin from now on. What those that
// are left out are being asked is theirs to end.
func (s *Supernode) SetSiblings(list map[peer.ID]Sibling) { s.siblings.Store((*siblings)(&list)) }

// sibling returns the peer ID in from if it is a sibling's.
func (s *Supernode) sibling(from string) peer.ID {
	sibs := *s.siblings.Load()
	if len(sibs) == 0 || from == "" {
		return ""
	}
	id, err := peer.Decode(from)
	if err != nil || sibs[id] == nil {
		return ""
	}
	return id
}

// only reduces an image to the layers that are asked for.
func only(m *registry.Manifest, layers []blockdev.Digest) (*registry.Manifest, error) {
	if len(layers) == 0 {
		return m, nil
	}
	part := *m
	part.Layers = nil
	for _, l := range m.Layers {
		if slices.Contains(layers, l.Digest) {
			part.Layers = append(part.Layers, l)
		}
	}
	if len(part.Layers) == 0 {
		return nil, fmt.Errorf("%s has none of the requested layers: %w", m.Ref, blockdev.ErrNotFound)
	}
	return &part, nil
}

// order sorts all supernodes by whom a diff belongs to, the owner first.
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
func (s *Supernode) obtain(ctx context.Context, r wanted, open ingest.Open) (store.LayerRecord, error) {
	sibs := *s.siblings.Load()
	if len(sibs) == 0 {
		return s.fetch(ctx, r, open)
	}
	if r.stored {
		return store.LayerRecord{}, fmt.Errorf("layer %s: not stored here: %w", r.l.Digest, blockdev.ErrNotFound)
	}
	order := sibs.order(s.self, r.l.DiffID)
	from := s.sibling(r.from)
	for _, id := range order {
		if id == s.self {
			break
		}
		if from != "" && id != from {
			continue // the sibling has found that one to be gone, or is to hear from it itself
		}
		// Who asks, and comes before this supernode, has the layer or nobody has.
		rec, err := s.copyLayer(ctx, r, id, sibs[id], id == from)
		if err == nil || !elsewhere(ctx, err) {
			return rec, err
		}
		if id == from {
			return rec, err
		}
		s.log.Info("the supernode that a layer belongs to does not answer; going on without this supernode", "layer", r.l.Digest, "supernode", id, "err", err)
	}
	for _, id := range order {
		// Also the one that asks: it may have fetched the layer when this
		// supernode could not be reached, and want it to be here, too.
		if id == s.self || sibs[id].Status() != nil {
			continue
		}
		if rec, err := s.copyLayer(ctx, r, id, sibs[id], true); err == nil {
			return rec, nil
		} else if ctx.Err() != nil {
			return rec, err
		}
	}
	rec, err := s.fetch(ctx, r, open)
	if err == nil {
		s.replicate(r, sibs, order)
	}
	return rec, err
}

// fetch gets a layer that no supernode has, from a node that has it or else from
// the registry.
func (s *Supernode) fetch(ctx context.Context, r wanted, open ingest.Open) (store.LayerRecord, error) {
	if rec, err := s.fromHolders(ctx, r); err == nil || ctx.Err() != nil {
		return rec, err
	}
	return s.ingestLayer(ctx, r, open)
}

// elsewhere says whether another supernode may do what this one could not.
func elsewhere(ctx context.Context, err error) bool {
	return ctx.Err() == nil && (errors.Is(err, blockdev.ErrUnavailable) || errors.Is(err, blockdev.ErrNotFound) || errors.Is(err, context.DeadlineExceeded))
}

// replicate has the next supernode in the order copy a layer that has just been
// ingested here, so that what dies with this one is what is in flight.
func (s *Supernode) replicate(r wanted, sibs siblings, order []peer.ID) {
	next := peer.ID("")
	at := slices.Index(order, s.self)
	for i := 1; i < len(order) && next == ""; i++ {
		if id := order[(at+i)%len(order)]; sibs[id].Status() == nil {
			next = id
		}
	}
	if next == "" {
		return
	}
	// Not a flight that anybody waits for; Close ends it.
	ctx, end, err := s.begin(s.ctx)
	if err != nil {
		return
	}
	go func() {
		defer end()
		ctx, cancel := context.WithTimeout(ctx, replicateTimeout)
		defer cancel()
		_, err := sibs[next].OpenImage(ctx, s.layerRequest(r, false))
		if err != nil && s.ctx.Err() == nil {
			s.log.Warn("another supernode could not copy a layer; only this supernode has it", "layer", r.l.Digest, "err", err)
		}
	}()
}

func (s *Supernode) layerRequest(r wanted, stored bool) blockdev.ImageRequest {
	return blockdev.ImageRequest{Ref: r.m.Ref, Manifest: r.m.Digest, Credential: r.cred, Only: []blockdev.Digest{r.l.Digest}, Stored: stored, Progress: r.watch}
}

// copyLayer stores a layer that a sibling has; unless stored is set, the sibling
// fetches it first if it does not.
func (s *Supernode) copyLayer(ctx context.Context, r wanted, id peer.ID, sib Sibling, stored bool) (store.LayerRecord, error) {
	if err := sib.Status(); err != nil {
		return store.LayerRecord{}, err
	}
	key := "copy " + string(id) + " " + r.key() + " " + registry.CredentialHash(r.cred)
	err := s.once(ctx, key, outlives, nil, func(ctx context.Context, _ *progress) error {
		return s.copyFrom(ctx, r, id, sib, stored)
	})
	if err != nil {
		return store.LayerRecord{}, fmt.Errorf("layer %s, from supernode %s: %w", r.l.Digest, id, err)
	}
	return s.store.Layer(r.l.Digest)
}

func (s *Supernode) copyFrom(ctx context.Context, r wanted, id peer.ID, sib Sibling, stored bool) error {
	began := time.Now()
	ask := ctx
	if stored {
		var cancel context.CancelFunc
		ask, cancel = context.WithTimeout(ctx, askTimeout)
		defer cancel()
	}
	r.watch = nil // it outlives who waits
	img, err := sib.OpenImage(ask, s.layerRequest(r, stored))
	if err != nil {
		return err
	}
	if len(img.Layers) == 0 || img.Layers[0].Digest != r.l.Digest || img.Layers[0].DiffID != r.l.DiffID {
		return fmt.Errorf("not the requested layer: %w", blockdev.ErrCorrupt)
	}
	enc := img.Layers[0].Index
	ix, err := index.Decode(enc)
	if err != nil {
		return err
	}
	if ix.DiffID != r.l.DiffID {
		return fmt.Errorf("the index belongs to %s: %w", ix.DiffID, blockdev.ErrCorrupt)
	}
	chunks := slices.Clone(ix.Chunks)
	for _, p := range ix.Headers {
		chunks = append(chunks, blockdev.Chunk{Length: p.Length, Digest: p.Digest})
	}
	session, err := s.store.Begin(r.l.Digest)
	if err != nil {
		return err
	}
	defer session.Abort()
	if err := fetchAll(ctx, sib, r.l.DiffID, chunks, session); err != nil {
		return err
	}
	rec := store.LayerRecord{Layer: r.l.Digest, Size: r.l.Size, DiffID: r.l.DiffID, Origins: []string{originOf(r.m)}}
	if err := session.Publish(ctx, rec, enc, ix.Digests()); err != nil {
		return err
	}
	s.metrics.copies.Inc()
	s.log.Info("layer copied from another supernode", "image", r.m.Ref, "layer", r.l.Digest, "supernode", id, "took", time.Since(began))
	return nil
}

// fetchAll puts chunks into the store.
func fetchAll(ctx context.Context, sib Sibling, diff blockdev.Digest, chunks []blockdev.Chunk, session *store.Ingest) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(copyStreams)
	for batch := range slices.Chunk(chunks, copyRequest) {
		g.Go(func() error {
			return sib.Fetch(ctx, blockdev.Request{Diff: diff, Chunks: batch}, func(i int, data []byte) error {
				if err := batch[i].Check(data); err != nil {
					return err
				}
				return session.Put(ctx, batch[i].Digest, data)
			})
		})
	}
	return g.Wait()
}
