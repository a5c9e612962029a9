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
	"github.com/shoalfs/shoal/supernode/flight"
	"github.com/shoalfs/shoal/supernode/slots"
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

	stage             atomic.Int32
	fetched, unpacked atomic.Int64
	told              atomic.Int64 // fetched and unpacked bytes when news was told last
	news              flight.Progress[Progress]

	mu      sync.Mutex
	claims  []blockdev.Digest // DiffIDs that askers' configs say
	opens   []opening         // of those who asked, each with its own credential
	shown   []string          // origins that have sent something
	refused bool              // all of opens have failed: there is nothing to add to
}

// opening is how one of those who asked gets the layer.
type opening struct {
	open   Open
	origin string
}

func (f *arrival) progress() Progress {
	return Progress{
		Layer: f.l.Digest, Stage: Stage(f.stage.Load()),
		Fetched: f.fetched.Load(), Total: f.l.Size, Unpacked: f.unpacked.Load(),
	}
}

// to notes where the layer is.
func (f *arrival) to(s Stage) {
	f.stage.Store(int32(s))
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

// join finds the layer's flight or starts it. tries: the flight also tries the
// caller's Open before it gives up.
func (in *Ingester) join(l Layer) (a *flight.Asker[*arrival], tries bool, _ error) {
	a, err := in.flights.Join(l.key(), func() (*arrival, flight.Work) {
		f := &arrival{in: in, l: l, claims: []blockdev.Digest{l.DiffID}, opens: []opening{{l.Open, l.Origin}}}
		f.tell()
		return f, f.run
	})
	if err != nil || a.Led {
		return a, true, err
	}
	return a, a.State.also(l), nil
}

// also notes what one more asker says and has. True: its Open will be tried.
func (f *arrival) also(l Layer) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Contains(f.claims, l.DiffID) {
		f.claims = append(f.claims, l.DiffID)
	}
	if len(f.opens) >= maxOpens || f.refused {
		return false
	}
	f.opens = append(f.opens, opening{l.Open, l.Origin})
	return true
}

// run is the flight's work.
func (f *arrival) run(ctx context.Context) error {
	err := f.fly(ctx)
	if err == nil {
		f.to(StageStored)
		f.in.stats.ingested.Add(1)
	} else {
		f.in.stats.failed.Add(1)
	}
	return err
}

// errYielded ends a turn of a layer whose registry sends less than Config.LeastRate,
// while another one waits. No asker sees it.
var errYielded = errors.New("its registry sends next to nothing, and others wait")

// fly takes the layer through, in as many turns as that takes.
func (f *arrival) fly(ctx context.Context) error {
	for turn := 0; ; turn++ {
		err := f.turn(ctx, turn)
		if ctx.Err() != nil || !errors.Is(err, errYielded) {
			return err
		}
		f.to(StageWaiting)
		f.in.stats.yields.Add(1)
		f.in.cfg.Log.Warn("a registry sends a layer too slowly to keep others waiting; it goes on after them", "image", f.l.Ref,
			"layer", f.l.Digest, "at", f.fetched.Load(), "size", f.l.Size)
	}
}

// turn waits for a place and for room in the spool, and takes the layer through, or
// gives up its place on the way.
func (f *arrival) turn(ctx context.Context, n int) error {
	sf, release, err := f.board(ctx, n)
	if err != nil {
		return err
	}
	defer release()
	pieced := sf.length > 0
	tctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer f.pace(tctx, n, cancel)()
	err = f.through(tctx, sf, &pieced)
	if pieced && errors.Is(err, blockdev.ErrCorrupt) && tctx.Err() == nil {
		// The seam may be the cause: a power failure can leave garbage at the end of
		// the spool file, and a registry may answer a range request with something
		// else. Once more, all of it from the registry.
		f.in.cfg.Log.Warn("layer wrong after resuming its download; fetching all of it again", "image", f.l.Ref, "layer", f.l.Digest, "error", err)
		if err = sf.restart(); err == nil {
			err = f.through(tctx, sf, &pieced)
		}
	}
	// What is wrong in itself is not kept; what a later attempt can go on with is.
	keep := err != nil && !errors.Is(err, blockdev.ErrCorrupt) && !errors.Is(err, blockdev.ErrUnsupported)
	if cerr := sf.giveUp(keep); cerr != nil {
		f.in.cfg.Log.Warn("spool file not given up", "layer", f.l.Digest, "error", cerr)
	}
	return err
}

// board takes a place and room in the spool. It waits for the one without having the
// other, so that nobody who lacks room keeps others from a place.
func (f *arrival) board(ctx context.Context, rank int) (*spoolFile, func(), error) {
	places := f.in.places(f.l.Size)
	for {
		release, err := places.TakeRanked(ctx, f.l.Host, rank)
		if err != nil {
			return nil, nil, err
		}
		sf, wait, err := f.in.spool.take(spoolName(f.l.key()), f.l.Size)
		if sf != nil {
			return sf, release, nil
		}
		release()
		if err == nil {
			err = f.in.spool.wait(ctx, wait)
		}
		if err != nil {
			return nil, nil, err
		}
	}
}

// pace ends the turn where the registry trickles and another layer waits. A layer
// that has had turns gets longer ones: what is in its spool file is unpacked anew in
// each.
func (f *arrival) pace(ctx context.Context, turn int, end context.CancelCauseFunc) (stop func()) {
	places := f.in.places(f.l.Size)
	window := f.in.cfg.Turn << min(turn, maxTurnShift)
	done := make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(window)
		defer t.Stop()
		before := f.fetched.Load()
		for {
			select {
			case <-t.C:
			case <-ctx.Done():
				return
			}
			now := f.fetched.Load()
			slow := Stage(f.stage.Load()) == StageFetching && float64(now-before) < float64(f.in.cfg.LeastRate)*window.Seconds()
			if slow && (places.Waiting() > 0 || f.in.spool.waiting.Load() > 0) {
				end(errYielded)
				return
			}
			before = now
		}
	}()
	return func() {
		end(nil)
		<-done
	}
}

// maxTurnShift bounds how much longer turns become.
const maxTurnShift = 5

// places are those for a layer of so many bytes.
func (in *Ingester) places(size int64) *slots.Slots {
	if size <= SmallLayer {
		return in.small
	}
	return in.large
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
	f.to(StageFetching)
	f.in.stats.resumed.Add(sf.length)

	t := newTail(sf.f, sf.length)
	var ix *blockdev.Index
	var fetchErr error
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		l := f.l
		l.Open = f.open
		fe := &fetcher{in: f.in, l: l, sf: sf, t: t, fetch: func(n int) {
			f.fetched.Add(int64(n))
			f.in.stats.fetched.Add(int64(n))
			f.moved()
		}}
		fetchErr = fe.run(gctx)
		*pieced = *pieced || fe.broke
		if f.stage.CompareAndSwap(int32(StageFetching), int32(StageUnpacking)) {
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
	f.to(StageStoring)
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
	tar, err := Decompress(r)
	if err != nil {
		return nil, err
	}
	defer tar.Close()
	c := &counting{r: tar, f: f}
	ix, err := layer.Build(ctx, c, session.Put, f.in.cfg.Build)
	if t, ok := tar.(*tarStream); ok && err == nil && t.trailing() {
		f.in.cfg.Log.Warn("something follows the layer's gzip stream that is none; it is passed over, as gzip does. "+
			"containerd unpacks this image only where it finds unpigz", "image", f.l.Ref, "layer", f.l.Digest)
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

// open asks with the credentials of those who wait, in the order in which they
// came, until one is let in.
func (f *arrival) open(ctx context.Context, offset int64) (io.ReadCloser, error) {
	for i := 0; ; i++ {
		f.mu.Lock()
		o := f.opens[i]
		f.mu.Unlock()
		rc, err := o.open(ctx, offset)
		if err == nil {
			f.mu.Lock()
			if !slices.Contains(f.shown, o.origin) {
				f.shown = append(f.shown, o.origin)
			}
			f.mu.Unlock()
			return rc, nil
		}
		if !errors.Is(err, blockdev.ErrUnauthorized) && !errors.Is(err, blockdev.ErrNotFound) {
			return nil, err
		}
		f.mu.Lock()
		last := i == len(f.opens)-1 // now: somebody may have come meanwhile
		f.refused = f.refused || last
		f.mu.Unlock()
		if last {
			return nil, err
		}
	}
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
