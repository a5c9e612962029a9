package layers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/lru"
	"github.com/shoalfs/shoal/internal/quiet"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/supernode/access"
	"github.com/shoalfs/shoal/supernode/ingest"
	"github.com/shoalfs/shoal/supernode/slots"
	"github.com/shoalfs/shoal/supernode/store"
)

// Config says where layers come from and go to. Store, Registry, Leases and Log are required.
type Config struct {
	Store    *store.Store
	Registry *registry.Client
	// Leases are those of Store.
	Leases *Leases
	// Ingest says how layers of registries are stored. Its Store, Log and Ended are set here.
	Ingest ingest.Config
	// Trusted are registry hosts whose word counts for layers of others, too.
	Trusted []string
	// Holders, if not nil, returns up to n nodes that have all of an image on the
	// word of origin, a registry's host and repository. They are asked for layers that no supernode
	// has any more, and closed then.
	Holders func(manifest blockdev.Digest, origin string, n int) []Holder
	// Self is this supernode's peer ID, and Siblings are the others, by theirs.
	Self     peer.ID
	Siblings map[peer.ID]Sibling
	Log      *slog.Logger
	// Registerer, if not nil, takes the metrics.
	Registerer prometheus.Registerer
	// Now is the time; tests give their own.
	Now func() time.Time
}

// hostsFactor bounds work side by side with what registries may do while others are
// slow: so many times what there is for all.
const hostsFactor = 8

// Layers brings layers into a store. All methods may be called from any goroutine.
type Layers struct {
	cfg       Config
	trusted   map[string]bool
	siblings  atomic.Pointer[siblings]
	ingest    *ingest.Ingester
	flights   *flight.Group[string, *progress]
	failed    *failures
	verifying *slots.Slots // places for verifications, by registry host
	restoring *slots.Slots // places for layers that come from holders, by registry host
	metrics   *metrics
	quiet     quiet.Quiet // what the log says of requests that nodes may repeat at will
}

// New prepares what layers need on their way. Its errors name what is wrong with the
// directory of the spool.
func New(cfg Config) (*Layers, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	l := &Layers{
		cfg:       cfg,
		trusted:   map[string]bool{},
		flights:   flight.New[string, *progress](outlives, errClosed),
		failed:    &failures{now: cfg.Now, errs: lru.New[string, failure](maxFailures)},
		verifying: slots.New(cfg.Ingest.Parallel, hostsFactor*cfg.Ingest.Parallel),
		restoring: slots.New(maxRestores, hostsFactor*maxRestores),
	}
	l.SetSiblings(cfg.Siblings)
	for _, h := range cfg.Trusted {
		l.trusted[strings.ToLower(h)] = true
	}
	var err error
	if l.metrics, err = newMetrics(cfg.Registerer); err != nil {
		return nil, err
	}
	cfg.Ingest.Store, cfg.Ingest.Log, cfg.Ingest.Ended = cfg.Store, cfg.Log, l.ingested
	if l.ingest, err = ingest.New(cfg.Ingest); err != nil {
		l.metrics.Unregister()
		return nil, err
	}
	return l, nil
}

// errClosed is the end of work that runs when Close is called.
var errClosed = fmt.Errorf("layers are fetched no more: %w", blockdev.ErrUnavailable)

// Close ends all work. A layer that is half fetched goes on after the next start.
func (l *Layers) Close() error {
	l.flights.Close()
	err := l.ingest.Close()
	l.metrics.Unregister()
	return err
}

// Places are those for work: ingests of large and of small layers, verifications, and
// layers that come from nodes.
func (l *Layers) Places() map[string]func() blockdev.Use {
	return map[string]func() blockdev.Use{
		"ingests":       func() blockdev.Use { large, _, _ := l.ingest.Uses(); return large },
		"small_ingests": func() blockdev.Use { _, small, _ := l.ingest.Uses(); return small },
		"verifying":     l.verifying.Use,
		"restoring":     l.restoring.Use,
	}
}

// Spool is what layers under way take of the spool, in bytes.
func (l *Layers) Spool() blockdev.Use {
	_, _, spool := l.ingest.Uses()
	return spool
}

// Request is what a caller wants of one layer.
type Request struct {
	// From is the peer that asks.
	From     string
	Manifest *registry.Manifest // that lists the layer
	Layer    registry.Layer
	// Credential is what the registry is asked with, and Verdict its word.
	Credential image.Credential
	Verdict    access.Verdict
	// Stored: nothing is to be fetched.
	Stored bool
	// Watch, if not nil, is called with where the layer is, but not any more when Ensure has
	// returned. Calls come one at a time.
	Watch func(image.Progress)
}

// key names all that somebody wants of a layer: what one has been refused says
// nothing about another.
func (r Request) key() string {
	return fmt.Sprint(originOf(r.Manifest), " ", r.Layer.Digest, " ", r.Layer.DiffID, " ", r.Layer.Size, " ", r.Layer.MediaType)
}

// record is what is published of the layer once it is here.
func (r Request) record() store.LayerRecord {
	return store.LayerRecord{Layer: r.Layer.Digest, Size: r.Layer.Size, DiffID: r.Layer.DiffID, Origins: []string{originOf(r.Manifest)}}
}

// index is that of the layer in the answer of a sibling or holder, which was asked for it
// alone.
func (r Request) index(img *image.Image) ([]byte, *blockdev.Index, error) {
	if len(img.Layers) == 0 {
		return nil, nil, fmt.Errorf("the answer has no layer: %w", blockdev.ErrCorrupt)
	}
	enc := img.Layers[0].Index
	ix, err := index.Decode(enc)
	if err == nil && ix.DiffID != r.Layer.DiffID {
		err = fmt.Errorf("the index belongs to %s: %w", ix.DiffID, blockdev.ErrCorrupt)
	}
	return enc, ix, err
}

// pieces are the header pieces of a diff, as chunks to be fetched.
func pieces(ix *blockdev.Index) []blockdev.Chunk {
	out := make([]blockdev.Chunk, len(ix.Headers))
	for i, p := range ix.Headers {
		out[i] = blockdev.Chunk{Length: p.Length, Digest: p.Digest}
	}
	return out
}

// maxTurns bounds how often a layer is looked for again that others evict, or
// that somebody else failed to prove.
const maxTurns = 4

// ErrGone: what was in the store a moment ago is not there any more.
var ErrGone = errors.New("the store removed it before the answer")

// Ensure returns when the layer is stored, is what the image says it is, and
// may be handed out on the word of the image's repository. It is leased then, and not
// evicted in any case before release. If ctx ends, the work goes on, for the next one
// that asks. Errors name the layer, and nothing that the image does not say itself.
func (l *Layers) Ensure(ctx context.Context, r Request) (release func(), err error) {
	id := r.Layer.Digest
	for range maxTurns {
		rec, err := l.cfg.Store.Layer(id)
		if errors.Is(err, blockdev.ErrNotFound) {
			rec, err = l.obtain(ctx, r)
		}
		if err != nil {
			return nil, err
		}
		if !provenFor(rec, r.Manifest) {
			// Also whether the layer has the DiffID that the image says is told to
			// those alone that may have it.
			if err := l.prove(ctx, r, rec); err == nil || errors.Is(err, ErrGone) {
				continue
			} else if ctx.Err() != nil {
				return nil, fmt.Errorf("layer %s: waiting for it: %w", id, ctx.Err())
			} else {
				return nil, fmt.Errorf("layer %s: registry %s does not show that repository %s has it: %w", id, r.Manifest.Host, r.Manifest.Repository, err)
			}
		}
		if rec.DiffID != r.Layer.DiffID {
			if others, say := l.quiet.Say("DiffID", r.Manifest.Ref, l.cfg.Now()); say {
				l.cfg.Log.Warn("an image config is wrong about a layer's DiffID", "image", r.Manifest.Ref, "layer", id, "says", r.Layer.DiffID, "is", rec.DiffID, "others", others)
			}
			return nil, fmt.Errorf("layer %s: the image config says that its DiffID is %s, and the layer has another: %w", id, r.Layer.DiffID, blockdev.ErrCorrupt)
		}
		release := l.cfg.Leases.take(rec.DiffID, l.cfg.Store.Pin)
		if r.Watch != nil {
			r.Watch(image.Progress{Layer: id, Done: r.Layer.Size, Total: r.Layer.Size, Stage: image.StageStored})
		}
		return release, nil
	}
	return nil, fmt.Errorf("layer %s: the store removes it before nodes can use it: %w", id, blockdev.ErrUnavailable)
}

// fetch gets a layer that no supernode has, from a node that has it or else from
// the registry.
func (l *Layers) fetch(ctx context.Context, r Request) (store.LayerRecord, error) {
	if rec, err := l.fromHolders(ctx, r); err == nil || ctx.Err() != nil {
		return rec, err
	}
	return l.fromRegistry(ctx, r)
}

// progress is what callers learn that watch a layer's verification.
type progress = flight.Progress[image.Progress]

// outlives is for work that goes on if nobody waits: what has been fetched is of
// use to the next one, and a node that has given up often asks again.
var outlives = flight.Policy{Outlives: true}

// once runs work for all callers that ask with the same key at the same time. watch, which
// may be nil, is told where the work is, first of all at once, and not any more
// when once has returned.
func (l *Layers) once(ctx context.Context, key string, p flight.Policy, watch func(image.Progress), work func(context.Context, *progress) error) error {
	a, err := l.begin(key, p, work)
	if err != nil {
		return err
	}
	if watch != nil {
		defer a.State.Watch(watch)()
	}
	return a.Wait(ctx)
}

// begin joins the work with a key, or begins it.
func (l *Layers) begin(key string, p flight.Policy, work func(context.Context, *progress) error) (*flight.Asker[*progress], error) {
	return l.flights.JoinWith(key, p, func() (*progress, flight.Work) {
		state := new(progress)
		return state, func(ctx context.Context) error { return work(ctx, state) }
	})
}
