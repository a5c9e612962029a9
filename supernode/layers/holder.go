package layers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/blockdev/proof"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/supernode/store"
)

// Holder is a node that has all of an image, on the word of the image's repository.
// It is not trusted: what it says is proven against the DiffID.
type Holder interface {
	blockdev.Source
	// FetchIndexes returns the indexes of those layers of the request's Manifest whose
	// DiffIDs are in Only. It gets no credential.
	image.Source
	Close() error
}

const (
	// maxHolders is how many nodes are asked before the registry is.
	maxHolders = 3
	// maxRestores is how many layers come from holders at a time. A node answers as
	// many requests for an index.
	maxRestores = 2
	// holderRequest is how many chunks a holder is asked for at a time. Two such
	// requests are in memory for a layer's content and two for its tar headers: at
	// most 64 MiB, 16 MiB as a rule.
	holderRequest = 64
	// A holder that needs more than restoreTime, and a second for restoreRate bytes of
	// the blob, is given up: somebody waits, and there is a registry.
	// restoreWait is how long a layer waits for others that come from holders.
	restoreTime = 30 * time.Second
	restoreWait = 5 * time.Second
	restoreRate = 1 << 20
)

// fromHolders gets a layer from a node that has it: this supernode had it, too, or
// the group would have nobody, and has lost it since. So its registry sends
// nothing twice, and is not needed.
func (l *Layers) fromHolders(ctx context.Context, r Request) (store.LayerRecord, error) {
	if l.cfg.Holders == nil {
		return store.LayerRecord{}, blockdev.ErrNotFound
	}
	err := l.once(ctx, "holders "+r.key(), outlives, nil, func(ctx context.Context, _ *progress) error {
		holders := l.cfg.Holders(r.Manifest.Digest, originOf(r.Manifest), maxHolders)
		defer func() {
			for _, h := range holders {
				_ = h.Close() // nothing is under way any more
			}
		}()
		if len(holders) == 0 {
			return fmt.Errorf("no node has layer %s: %w", r.Layer.Digest, blockdev.ErrNotFound)
		}
		// Nobody waits long for nodes that are busy with other layers: there is a registry.
		wait, cancel := context.WithTimeout(ctx, restoreWait)
		defer cancel()
		release, err := l.restoring.Take(wait, r.Manifest.Host)
		if err != nil {
			return fmt.Errorf("layer %s: nodes give back other layers now: %w: %w", r.Layer.Digest, blockdev.ErrUnavailable, err)
		}
		defer release()
		return l.restore(ctx, r, holders)
	})
	if err != nil {
		return store.LayerRecord{}, err
	}
	return l.cfg.Store.Layer(r.Layer.Digest)
}

// restore asks one holder after the other.
func (l *Layers) restore(ctx context.Context, r Request, holders []Holder) (err error) {
	for _, h := range holders {
		began := time.Now()
		if err = l.restoreFrom(ctx, r, h); err == nil {
			l.metrics.restores.Inc()
			l.cfg.Log.Info("layer restored from a node that has the image", "image", r.Manifest.Ref, "layer", r.Layer.Digest, "took", time.Since(began))
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		l.cfg.Log.Info("cannot get a layer from a node that has the image", "image", r.Manifest.Ref, "layer", r.Layer.Digest, "error", err)
	}
	return err
}

// restoreFrom stores what a holder has, and publishes it if it is the layer: while
// it comes, the tar is put together again, hashed and indexed again.
func (l *Layers) restoreFrom(ctx context.Context, r Request, h Holder) error {
	ctx, cancel := context.WithTimeout(ctx, timeFor(r.Layer.Size))
	defer cancel()
	ask, stop := context.WithTimeout(ctx, askTimeout)
	defer stop()
	img, err := h.FetchIndexes(ask, image.Request{Ref: r.Manifest.Ref, Manifest: r.Manifest.Digest, Only: []blockdev.Digest{r.Layer.DiffID}, Stored: true})
	if err != nil {
		return err
	}
	enc, ix, err := r.index(img)
	if err != nil {
		return err
	}
	session, err := l.cfg.Store.Begin(r.Layer.Digest)
	if err != nil {
		return err
	}
	var fetches sync.WaitGroup
	defer func() {
		cancel()
		fetches.Wait()
		session.Abort()
	}()
	masked := &inOrder{next: bring(ctx, &fetches, h, ix.DiffID, ix.Chunks, session)}
	piece := bring(ctx, &fetches, h, ix.DiffID, pieces(ix), session)
	own, err := proof.Run(ctx, ix, masked, func(context.Context, blockdev.Piece) ([]byte, error) { return piece() })
	if err != nil {
		return err
	}
	if own != nil {
		// Another version of the builder has made the node's index; what is handed out
		// from here is what this one makes.
		if enc, err = index.Encode(own); err != nil {
			return err
		}
	}
	return session.Publish(ctx, r.record(), enc, ix.Digests())
}

// bring fetches chunks, checks and stores them, one request ahead of the function
// that it returns, which gives them in their order, in a goroutine that ends with ctx.
func bring(ctx context.Context, wg *sync.WaitGroup, from blockdev.Source, diff blockdev.Digest, chunks []blockdev.Chunk, session *store.Ingest) func() ([]byte, error) {
	type batch struct {
		data [][]byte
		err  error
	}
	batches := make(chan batch)
	begun := false
	run := func() {
		defer close(batches)
		for want := range slices.Chunk(chunks, holderRequest) {
			data, err := fetchBatch(ctx, from, diff, want, session)
			select {
			case batches <- batch{data, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}
	var now [][]byte
	return func() ([]byte, error) {
		if !begun {
			begun = true
			wg.Go(run)
		}
		for len(now) == 0 {
			b, ok := <-batches
			switch {
			case !ok && ctx.Err() != nil:
				return nil, ctx.Err()
			case !ok:
				return nil, io.EOF
			case b.err != nil:
				return nil, b.err
			}
			now = b.data
		}
		b := now[0]
		now = now[1:]
		return b, nil
	}
}

// fetchBatch fetches and stores chunks, each digest once.
func fetchBatch(ctx context.Context, from blockdev.Source, diff blockdev.Digest, want []blockdev.Chunk, session *store.Ingest) ([][]byte, error) {
	byDigest := make(map[blockdev.Digest][]byte, len(want))
	var ask []blockdev.Chunk
	for _, c := range want {
		if _, twice := byDigest[c.Digest]; !twice {
			byDigest[c.Digest] = nil
			ask = append(ask, c)
		}
	}
	err := from.Fetch(ctx, blockdev.Request{Diff: diff, Chunks: ask}, func(i int, data []byte) error {
		if err := ask[i].Check(data); err != nil {
			return err
		}
		if err := session.Put(ctx, ask[i].Digest, data); err != nil {
			return err
		}
		byDigest[ask[i].Digest] = slices.Clone(data)
		return nil
	})
	if err != nil {
		return nil, err
	}
	data := make([][]byte, len(want))
	for i, c := range want {
		if data[i] = byDigest[c.Digest]; len(data[i]) != int(c.Length) {
			return nil, fmt.Errorf("chunk %s has %d bytes, and in another place %d bytes: %w", c.Digest, len(data[i]), c.Length, blockdev.ErrCorrupt)
		}
	}
	return data, nil
}

// inOrder is an io.ReaderAt over chunks that come in their order, for a reader that reads on
// from where they begin.
type inOrder struct {
	next  func() ([]byte, error)
	chunk []byte
	start int64 // of chunk
}

// ReadAt implements io.ReaderAt.
func (r *inOrder) ReadAt(p []byte, off int64) (n int, err error) {
	if off < r.start {
		return 0, errors.New("read before the bytes that were read last")
	}
	for n < len(p) {
		at := off + int64(n) - r.start
		if at < int64(len(r.chunk)) {
			n += copy(p[n:], r.chunk[at:])
			continue
		}
		b, err := r.next()
		if err != nil {
			return n, err
		}
		r.start += int64(len(r.chunk))
		r.chunk = b
	}
	return n, nil
}
