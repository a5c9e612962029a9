package ingest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/layer"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/supernode/slots"
	"github.com/shoalfs/shoal/supernode/store"
)

// ErrClosed is returned after Close, and to callers that wait when it is called. It
// wraps blockdev.ErrUnavailable.
var ErrClosed = fmt.Errorf("ingest is shutting down: %w", blockdev.ErrUnavailable)

// ErrLimited is of an Open that is to come back later, as registries say it to those that
// ask too much, or that show no credential.
var ErrLimited = fmt.Errorf("the registry limits requests: %w", blockdev.ErrUnavailable)

// Config says how layers are ingested. A zero field means its default.
type Config struct {
	// Store is where layers go. Required.
	Store *store.Store
	// SpoolDir holds layers while they come, best on the store's disk. Required.
	SpoolDir string
	// SpoolQuota bounds the spool files together, in bytes; 0: the disk does.
	SpoolQuota int64
	// SpoolKey is how the user calls SpoolQuota, for error texts. Default
	// "store.spool_quota".
	SpoolKey string
	// SpoolExpiry is how long a partly fetched layer is kept for an ingest to go
	// on with. Default 24 hours.
	SpoolExpiry time.Duration
	// Parallel is how many layers are ingested at a time. A registry that has no
	// place gets one more, so that no layer waits for one that is slow. Layers of at
	// most SmallLayer bytes do not count among them but have as many places of
	// their own, so that a small image does not wait for a large one. Default 2.
	Parallel int
	// Grace is how long a flight goes on when no caller waits any more. Default 1
	// minute.
	Grace time.Duration
	// Retries bounds the attempts in a row that bring no byte. Default 5.
	Retries int
	// BackOff is the pause before the second of them; it doubles. Default 500 ms.
	BackOff time.Duration
	// Stall is how long a connection may bring nothing before it counts as
	// broken. Default 30 s.
	Stall time.Duration
	// LeastRate is what a registry has to send of a layer, in bytes a second, to keep
	// its place while another layer waits; see package doc. Default 128 KiB.
	LeastRate int64
	// Turn is for how long it is looked at how much it sends, and so the least time
	// that a layer has a place. Default 10 s.
	Turn time.Duration
	// MaxDiff bounds a layer's uncompressed size, in bytes. Default 256 GiB.
	MaxDiff int64
	// Build is passed on to layer.Build.
	Build layer.Options
	// Log gets retries and failures. Default: nothing.
	Log *slog.Logger
	// Ended, if not nil, is called at the end of each flight, with what its first asker
	// has said, how long it took and how it ended.
	Ended func(l Layer, took time.Duration, err error)
}

// hostsFactor bounds the places with those that registries have for being slow
// alone: so many times Config.Parallel.
const hostsFactor = 8

// SmallLayer is what counts as a small layer, in compressed bytes.
const SmallLayer = 8 << 20

func (c *Config) setDefaults() {
	defaults.Set(&c.SpoolKey, "store.spool_quota")
	defaults.Positive(&c.SpoolExpiry, 24*time.Hour)
	defaults.Positive(&c.Parallel, 2)
	defaults.Positive(&c.Grace, time.Minute)
	defaults.Positive(&c.Retries, 5)
	defaults.Positive(&c.BackOff, 500*time.Millisecond)
	defaults.Positive(&c.Stall, 30*time.Second)
	defaults.Positive(&c.LeastRate, 128<<10)
	defaults.Positive(&c.Turn, 10*time.Second)
	defaults.Positive(&c.MaxDiff, 256<<30)
	defaults.Log(&c.Log)
	if c.Ended == nil {
		c.Ended = func(Layer, time.Duration, error) {}
	}
}

// Open opens a layer's blob at offset (0..size): the reader's first byte is the
// blob's byte number offset, also if the registry ignores range requests. ctx
// ends the reading, too. Errors wrap blockdev.ErrUnauthorized, ErrNotFound,
// ErrUnsupported (all final), or anything else, which is tried again; one with a
// method RetryAfter() time.Duration > 0 says when. ErrUnauthorized, ErrNotFound and
// ErrLimited say nothing about callers that show the registry something else.
type Open func(ctx context.Context, offset int64) (io.ReadCloser, error)

// Layer is a layer to be ingested.
type Layer struct {
	// Ref names the image in errors and log lines.
	Ref string
	// Digest, Size (bytes) and MediaType are those of the manifest's descriptor.
	Digest    blockdev.Digest
	Size      int64
	MediaType string
	// DiffID is what the image config says.
	DiffID blockdev.Digest
	// Host is the registry that Open fetches from, and Origin how the store is to
	// call that and the repository. A caller that asks for the same layer of another
	// repository at the same time shares the bytes; only those that Open gave some
	// of are origins.
	Host, Origin string
	Open         Open
	// Shows names what Open shows the registry: of callers with the same Origin and
	// Shows, one asks for all. It is in no log line and no error.
	Shows string
}

// check says whether the layer may be one.
func (l Layer) check() error {
	if l.Size < 0 {
		return fmt.Errorf("size %d: %w", l.Size, blockdev.ErrCorrupt)
	}
	return checkMediaType(l.MediaType)
}

// Ingester ingests layers. All methods may be called from any goroutine.
type Ingester struct {
	cfg          Config
	spool        *spool
	large, small *slots.Slots // places, by registry host
	flights      *flight.Group[flightKey, *arrival]
	stats        counters

	ctx    context.Context // of expireSpool; ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

type flightKey struct {
	layer blockdev.Digest
	size  int64 // a wrong one is the fault of those alone that say it
	host  string
}

func (l Layer) key() flightKey { return flightKey{l.Digest, l.Size, l.Host} }

// New prepares the spool directory and deletes expired spool files.
func New(cfg Config) (*Ingester, error) {
	cfg.setDefaults()
	if cfg.Store == nil || cfg.SpoolDir == "" {
		return nil, errors.New("ingest: Store and SpoolDir are required")
	}
	sp, err := newSpool(cfg.SpoolDir, cfg.SpoolQuota, cfg.SpoolKey, cfg.SpoolExpiry)
	if err != nil {
		return nil, err
	}
	in := &Ingester{
		cfg:     cfg,
		spool:   sp,
		large:   slots.New(cfg.Parallel, hostsFactor*cfg.Parallel),
		small:   slots.New(cfg.Parallel, hostsFactor*cfg.Parallel),
		flights: flight.New[flightKey, *arrival](flight.Policy{Grace: cfg.Grace}, ErrClosed),
	}
	in.ctx, in.cancel = context.WithCancel(context.Background())
	in.wg.Go(in.expireSpool)
	return in, nil
}

// Close ends all flights and waits for them. Their spool files stay.
func (in *Ingester) Close() error {
	in.cancel()
	in.flights.Close()
	in.wg.Wait()
	return nil
}

func (in *Ingester) expireSpool() {
	t := time.NewTicker(max(in.cfg.SpoolExpiry/8, time.Second))
	defer t.Stop()
	for {
		select {
		case <-t.C:
			if err := in.spool.expire(); err != nil {
				in.cfg.Log.Warn("cannot delete expired spool files", "error", err)
			}
		case <-in.ctx.Done():
			return
		}
	}
}

// Progress is how far a layer is.
type Progress struct {
	Layer blockdev.Digest
	// Stage is one from waiting (for a place, or for room in the spool) to stored. Fetching
	// and unpacking go side by side; image.StageFetching lasts until the last byte has come.
	Stage image.Stage
	// Fetched of Total compressed bytes are here, Unpacked uncompressed bytes
	// have been read from them.
	Fetched, Total, Unpacked int64
}

// Layer returns the layer's record, after ingesting the layer if the store does
// not have it. watch, if not nil, is called with how far it is, at once and whenever some
// more has come; it must not block. The record may have other origins than l.Origin, or another
// DiffID, if the store had the layer or others asked for it, too: which of them may have it,
// and may know that the DiffID is another, is the caller's to decide.
//
// Errors name the layer, nothing of what others have asked for, and wrap blockdev.ErrCorrupt (digest, size,
// DiffID or content are wrong), ErrUnsupported, ErrUnauthorized, ErrNotFound,
// ErrUnavailable, ErrNoSpace, or the context's error; then the flight may go on.
func (in *Ingester) Layer(ctx context.Context, l Layer, watch func(Progress)) (store.LayerRecord, error) {
	rec, err := in.layer(ctx, l, watch)
	if err != nil {
		return store.LayerRecord{}, fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	return rec, nil
}

func (in *Ingester) layer(ctx context.Context, l Layer, watch func(Progress)) (store.LayerRecord, error) {
	if err := l.check(); err != nil {
		in.cfg.Ended(l, 0, err)
		return store.LayerRecord{}, err
	}
	if rec, err := in.cfg.Store.Layer(l.Digest); err == nil {
		return rec, nil
	}
	for {
		a, mine, err := in.join(l)
		if err != nil {
			return store.LayerRecord{}, err
		}
		rec, err := in.wait(ctx, a, l, watch)
		if ctx.Err() == nil && personal(err) && !a.State.asked(mine) {
			continue // that was the others' answer
		}
		if errors.Is(err, blockdev.ErrNotFound) && foreign(l.MediaType) {
			err = fmt.Errorf("a foreign layer that the registry does not have: %w: %w", blockdev.ErrUnsupported, err)
		}
		return rec, err
	}
}

// wait is told how a flight that the caller has joined ends, and leaves it.
func (in *Ingester) wait(ctx context.Context, a *flight.Asker[*arrival], l Layer, watch func(Progress)) (store.LayerRecord, error) {
	defer a.Leave()
	f := a.State
	if watch != nil {
		defer f.news.Watch(watch)()
	}
	select {
	case <-a.Done():
		// A caller that asked with another DiffID than the layer has learns of it even if
		// the flight has failed for everybody. If it has not, there is a record.
		if a.Err() != nil && f.rec.DiffID != (blockdev.Digest{}) {
			if err := claim(l, f.rec.DiffID); err != nil {
				return store.LayerRecord{}, err
			}
		}
		return f.rec, a.Err()
	case <-ctx.Done():
		return store.LayerRecord{}, ctx.Err()
	}
}

// claim checks what an image config says about a layer's DiffID.
func claim(l Layer, diffID blockdev.Digest) error {
	if l.DiffID != diffID {
		// What it is, is only for those to know that may have the layer.
		return fmt.Errorf("the image config says that its DiffID is %s, and the layer has another: %w", l.DiffID, blockdev.ErrCorrupt)
	}
	return nil
}

// Progress returns where all running flights are.
func (in *Ingester) Progress() []Progress {
	var ps []Progress
	for _, f := range in.flights.States() {
		ps = append(ps, f.progress())
	}
	return ps
}

// Stats are counters since New, and the number of flights now.
type Stats struct {
	Flights  int
	Ingested int64 // layers published
	Failed   int64 // flights that ended otherwise
	Yields   int64 // places that slow registries gave back to others
	Retries  int64 // connections that broke or were refused and were tried again
	Fetched  int64 // compressed bytes from the network
	Resumed  int64 // compressed bytes that were in a spool file already
	Unpacked int64 // uncompressed bytes
}

type counters struct {
	ingested, failed, yields, retries, fetched, resumed, unpacked atomic.Int64
}

// Stats returns a snapshot.
func (in *Ingester) Stats() Stats {
	c := &in.stats
	return Stats{
		Flights: in.flights.Len(), Ingested: c.ingested.Load(), Failed: c.failed.Load(), Yields: c.yields.Load(), Retries: c.retries.Load(),
		Fetched: c.fetched.Load(), Resumed: c.resumed.Load(), Unpacked: c.unpacked.Load(),
	}
}

// Pace is what a layer has to be fetched at to keep its place while another one waits.
func (in *Ingester) Pace() slots.Pace {
	return slots.Pace{Rate: in.cfg.LeastRate, Turn: in.cfg.Turn}
}

// Uses returns the places of large and of small layers, and the bytes of the spool.
func (in *Ingester) Uses() (large, small, spool blockdev.Use) {
	return in.large.Use(), in.small.Use(), in.spool.use()
}
