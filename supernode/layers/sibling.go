package layers

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/store"
)

// Sibling is another supernode of the same datacenter. It is trusted as this one
// is: with credentials, with which node may read what, and with which index belongs to
// which layer.
type Sibling interface {
	blockdev.Source
	image.Source
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

// siblings are the other supernodes. They are replaced, and never changed.
type siblings map[peer.ID]Sibling

// SetSiblings changes Config.Siblings for requests that begin from now on. What those that
// are left out are being asked is theirs to end.
func (l *Layers) SetSiblings(list map[peer.ID]Sibling) { l.siblings.Store((*siblings)(&list)) }

// Sibling returns the peer ID in from if it is a sibling's, else "".
func (l *Layers) Sibling(from string) peer.ID {
	sibs := *l.siblings.Load()
	if len(sibs) == 0 || from == "" {
		return ""
	}
	id, err := peer.Decode(from)
	if err != nil || sibs[id] == nil {
		return ""
	}
	return id
}

func (l *Layers) layerRequest(r Request, stored bool) image.Request {
	return image.Request{Ref: r.Manifest.Ref, Manifest: r.Manifest.Digest, Credential: r.Credential, Only: []blockdev.Digest{r.Layer.Digest}, Stored: stored, Progress: r.Watch}
}

// copyLayer stores a layer that a sibling has; unless stored is set, the sibling
// fetches it first if it does not.
func (l *Layers) copyLayer(ctx context.Context, r Request, id peer.ID, sib Sibling, stored bool) (store.LayerRecord, error) {
	if err := sib.Status(); err != nil {
		return store.LayerRecord{}, err
	}
	key := "copy " + string(id) + " " + r.key() + " " + registry.CredentialHash(r.Credential)
	err := l.once(ctx, key, outlives, nil, func(ctx context.Context, _ *progress) error {
		return l.copyFrom(ctx, r, id, sib, stored)
	})
	if err != nil {
		return store.LayerRecord{}, fmt.Errorf("layer %s, from supernode %s: %w", r.Layer.Digest, id, err)
	}
	return l.cfg.Store.Layer(r.Layer.Digest)
}

func (l *Layers) copyFrom(ctx context.Context, r Request, id peer.ID, sib Sibling, stored bool) error {
	began := time.Now()
	ask := ctx
	if stored {
		var cancel context.CancelFunc
		ask, cancel = context.WithTimeout(ctx, askTimeout)
		defer cancel()
	}
	r.Watch = nil // it outlives the caller that waits
	img, err := sib.FetchIndexes(ask, l.layerRequest(r, stored))
	if err != nil {
		return err
	}
	enc, ix, err := r.index(img)
	if err != nil {
		return err
	}
	if img.Layers[0].Digest != r.Layer.Digest {
		return fmt.Errorf("not the requested layer: %w", blockdev.ErrCorrupt)
	}
	chunks := slices.Concat(ix.Chunks, pieces(ix))
	session, err := l.cfg.Store.Begin(r.Layer.Digest)
	if err != nil {
		return err
	}
	defer session.Abort()
	if err := fetchAll(ctx, sib, r.Layer.DiffID, chunks, session); err != nil {
		return err
	}
	if err := session.Publish(ctx, r.record(), enc, ix.Digests()); err != nil {
		return err
	}
	l.metrics.copies.Inc()
	l.cfg.Log.Info("layer copied from another supernode", "image", r.Manifest.Ref, "layer", r.Layer.Digest, "supernode", id, "took", time.Since(began))
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
