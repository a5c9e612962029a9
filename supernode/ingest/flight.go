package ingest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/blockdev/layer"
	"github.com/shoalfs/shoal/internal/blob"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/supernode/store"
)

// arrival is one layer on its way from one registry into the store: the state of a
// flight.
type arrival struct {
	in *Ingester
	l  Layer // the first asker's

	// Set before the flight is done. rec.DiffID is set as soon as it is known, also
	// if the flight fails.
	rec store.LayerRecord

	stage             atomic.Value // image.Stage
	fetched, unpacked atomic.Int64
	told              atomic.Int64 // fetched and unpacked bytes when news was told last
	news              flight.Progress[Progress]

	more chan struct{} // has something if an opening has come since all were asked

	mu     sync.Mutex
	claims []blockdev.Digest // DiffIDs that askers' configs say
	opens  []*opening        // of the callers that asked
	shown  []string          // origins that have sent something
}

// opening is how those of the callers get the layer that show the same to one origin.
type opening struct {
	open          Open
	origin, shows string
	asked         bool // guarded by arrival.mu
}

func (f *arrival) progress() Progress {
	return Progress{
		Layer: f.l.Digest, Stage: f.at(),
		Fetched: f.fetched.Load(), Total: f.l.Size, Unpacked: f.unpacked.Load(),
	}
}

// at is where the layer is.
func (f *arrival) at() image.Stage {
	if s, ok := f.stage.Load().(image.Stage); ok {
		return s
	}
	return image.StageWaiting
}

// to notes where the layer is.
func (f *arrival) to(s image.Stage) {
	f.stage.Store(s)
	f.tell()
}

// moved tells watchers now and then how far the layer is: a thousand of them are not
// to cost much of what the layer itself does.
func (f *arrival) moved() {
	now, last := f.fetched.Load()+f.unpacked.Load(), f.told.Load()
	if (last == 0 || now-last >= max(newsStep, f.l.Size/newsParts)) && f.told.CompareAndSwap(last, now) {
		f.tell()
	}
}

func (f *arrival) tell() { f.news.Report(f.progress()) }

const (
	// newsStep and newsParts: watchers are told after so many bytes, or such a part
	// of the blob, whichever is more.
	newsStep  = 256 << 10
	newsParts = 64
)

// maxOpens bounds the credentials that a flight falls back to.
const maxOpens = 8

// join finds the layer's flight or starts it. The opening is the caller's; nil: there are
// too many of others.
func (in *Ingester) join(l Layer) (*flight.Asker[*arrival], *opening, error) {
	a, err := in.flights.Join(l.key(), func() (*arrival, flight.Work) {
		f := &arrival{in: in, l: l, more: make(chan struct{}, 1)}
		f.also(l)
		f.tell()
		return f, f.run
	})
	if err != nil {
		return nil, nil, err
	}
	return a, a.State.also(l), nil
}

// also notes what one more asker says and has.
func (f *arrival) also(l Layer) *opening {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Contains(f.claims, l.DiffID) {
		f.claims = append(f.claims, l.DiffID)
	}
	for _, o := range f.opens {
		if o.origin == l.Origin && o.shows == l.Shows {
			return o
		}
	}
	if len(f.opens) >= maxOpens {
		return nil
	}
	o := &opening{open: l.Open, origin: l.Origin, shows: l.Shows}
	f.opens = append(f.opens, o)
	select {
	case f.more <- struct{}{}:
	default:
	}
	return o
}

// next is the opening number i, which is asked now; nil: all have been.
func (f *arrival) next(i int) *opening {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i == len(f.opens) {
		return nil
	}
	f.opens[i].asked = true
	if i == len(f.opens)-1 {
		select {
		case <-f.more:
		default:
		}
	}
	return f.opens[i]
}

// asked says whether a failure is also the answer to this opening.
func (f *arrival) asked(o *opening) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return o != nil && o.asked
}

// run is the flight's work.
func (f *arrival) run(ctx context.Context) error {
	began := time.Now()
	err := f.fly(ctx)
	switch {
	case err == nil:
		f.to(image.StageStored)
		f.in.stats.ingested.Add(1)
	case ctx.Err() != nil:
		err = context.Cause(ctx)
		fallthrough
	default:
		f.in.stats.failed.Add(1)
	}
	f.in.cfg.Ended(f.l, time.Since(began), err)
	return err
}

func spoolName(k flightKey) string {
	from := blockdev.Sum(fmt.Appendf(nil, "%d %s", k.size, k.host))
	return k.layer.Hex() + "-" + from.Hex()[:16]
}

// through runs both sides of the pipeline over the spool file and publishes.
// pieced becomes true if the blob did not come over one connection.
func (f *arrival) through(ctx context.Context, sf *spoolFile, pieced *bool) error {
	session, err := f.in.cfg.Store.Begin(f.l.Digest)
	if err != nil {
		return err
	}
	defer session.Abort() // does nothing once published
	f.fetched.Store(sf.length)
	f.unpacked.Store(0)
	f.told.Store(0)
	f.to(image.StageFetching)
	f.in.stats.resumed.Add(sf.length)

	t := newTail(sf.f, sf.length)
	var ix *blockdev.Index
	var fetchErr error
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		l := f.l
		l.Open = f.open
		fe := &fetcher{in: f.in, l: l, sf: sf, t: t, more: f.more, fetch: func(n int) {
			f.fetched.Add(int64(n))
			f.in.stats.fetched.Add(int64(n))
			f.moved()
		}}
		fetchErr = fe.run(gctx)
		*pieced = *pieced || fe.broke
		if f.stage.CompareAndSwap(image.StageFetching, image.StageUnpacking) {
			f.tell()
		}
		return fetchErr
	})
	g.Go(func() error {
		var err error
		ix, err = f.build(gctx, &reader{ctx: gctx, t: t}, session)
		return err
	})
	if err := g.Wait(); err != nil {
		return f.reason(ctx, err, fetchErr)
	}
	f.rec = store.LayerRecord{Layer: f.l.Digest, Size: f.l.Size, DiffID: ix.DiffID, Origins: f.origins()}
	if !f.claimed(ix.DiffID) {
		return claim(f.l, ix.DiffID)
	}
	f.to(image.StageStoring)
	enc, err := index.Encode(ix)
	if err != nil {
		return err
	}
	return session.Publish(ctx, f.rec, enc, ix.Digests())
}

// reason picks the error that says why: a broken download also breaks the
// unpacking, and an error of the unpacking cancels the download.
func (f *arrival) reason(ctx context.Context, first, fetchErr error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case fetchErr != nil && !errors.Is(fetchErr, context.Canceled):
		return fetchErr
	}
	return first
}

// build unpacks what r brings.
func (f *arrival) build(ctx context.Context, r io.Reader, session *store.Ingest) (*blockdev.Index, error) {
	tar, err := blob.Decompress(r)
	if err != nil {
		return nil, err
	}
	defer tar.Close()
	c := &counting{r: tar, f: f}
	ix, err := layer.Build(ctx, c, session.Put, f.in.cfg.Build)
	if err == nil && tar.Trailing() {
		f.in.cfg.Log.Warn("a layer has other bytes after its gzip stream; they are ignored, as gzip ignores them. "+
			"containerd can unpack this image only if unpigz is installed", "image", f.l.Ref, "layer", f.l.Digest)
	}
	return ix, err
}

// counting counts what is unpacked, and bounds it.
type counting struct {
	r io.Reader
	f *arrival
	n int64
}

// Read implements io.Reader.
func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.f.unpacked.Store(c.n)
	c.f.in.stats.unpacked.Add(int64(n))
	c.f.moved()
	if limit := c.f.in.cfg.MaxDiff; c.n > limit {
		return n, fmt.Errorf("the layer unpacks to more than %d GiB: %w", limit>>30, blockdev.ErrUnsupported)
	}
	return n, err
}

func (f *arrival) claimed(diffID blockdev.Digest) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.claims, diffID)
}

// open asks with the credentials of the callers that wait, in the order in which they
// came, until one is let in. If none is, the error is that which passes soonest.
func (f *arrival) open(ctx context.Context, offset int64) (io.ReadCloser, error) {
	var refused, limited error
	for i := 0; ; i++ {
		o := f.next(i)
		if o == nil && limited != nil {
			return nil, limited
		} else if o == nil {
			return nil, refused
		}
		rc, err := o.open(ctx, offset)
		switch {
		case err == nil:
			f.mu.Lock()
			if !slices.Contains(f.shown, o.origin) {
				f.shown = append(f.shown, o.origin)
			}
			f.mu.Unlock()
			return rc, nil
		case !personal(err):
			return nil, err
		case !errors.Is(err, ErrLimited):
			refused = err
		case limited == nil || retryAfter(err) < retryAfter(limited):
			limited = err
		}
	}
}

// personal says whether an error of an Open says nothing about another caller's.
func personal(err error) bool {
	return errors.Is(err, blockdev.ErrUnauthorized) || errors.Is(err, blockdev.ErrNotFound) || errors.Is(err, ErrLimited)
}

// origins are those that have sent some of the blob in this flight; all of it may
// have been in the spool.
func (f *arrival) origins() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.shown) == 0 {
		return []string{f.l.Host}
	}
	return slices.Clone(f.shown)
}
