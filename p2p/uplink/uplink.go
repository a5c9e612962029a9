package uplink

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/p2p/wire"
)

// Supernode is one of them: an *exchange.Client.
type Supernode interface {
	blockdev.Source
	image.Source
	image.DocumentSource
	blockdev.ProfileSink
	// Status returns nil if it can be reached.
	Status() error
	// Gone returns for how long it could not; 0: it can.
	Gone() time.Duration
	Close() error
}

// Uplink asks supernodes, one after the other.
type Uplink struct {
	set atomic.Pointer[set]
	pace

	mu sync.Mutex
	// from says which supernode gave out a diff's index: the one that learns what containers read of
	// it, and hands that out with the image again.
	from map[blockdev.Digest]Supernode
}

// set is the supernodes that there are. It is replaced, and never changed.
type set struct {
	ids   []peer.ID
	nodes map[peer.ID]Supernode
}

// maxFrom bounds Uplink.from.
const maxFrom = 16384

var (
	_ blockdev.Source      = (*Uplink)(nil)
	_ image.Source         = (*Uplink)(nil)
	_ image.DocumentSource = (*Uplink)(nil)
	_ blockdev.ProfileSink = (*Uplink)(nil)
)

// New returns an Uplink to these supernodes, at least one.
func New(nodes map[peer.ID]Supernode) (*Uplink, error) {
	u := &Uplink{from: map[blockdev.Digest]Supernode{},
		pace: pace{slow: map[Supernode]time.Time{}, trials: map[Supernode]int{}}}
	u.set.Store(&set{})
	if err := u.Set(nodes); err != nil {
		return nil, err
	}
	return u, nil
}

// Set changes which supernodes there are, at least one, for requests that begin from now
// on. Those that are not among them any more are closed: what they are being asked goes on
// as when they go away. Without a supernode nothing changes; other errors are those of
// closing.
func (u *Uplink) Set(nodes map[peer.ID]Supernode) error {
	if len(nodes) == 0 {
		return errors.New("uplink: no supernode")
	}
	before := u.set.Swap(&set{ids: slices.Collect(maps.Keys(nodes)), nodes: nodes})
	var errs []error
	for id, s := range before.nodes {
		if nodes[id] != s {
			errs = append(errs, s.Close())
			u.forget(s)
		}
	}
	return errors.Join(errs...)
}

// Close closes all of them.
func (u *Uplink) Close() error {
	var errs []error
	for _, s := range u.set.Load().nodes {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// order lists the supernodes as they are to be asked: those that are there first, of them
// those last that are slow. probe is how long a request takes to find out whether one
// still is; 0: this one does not.
func (u *Uplink) order(key blockdev.Digest, probe time.Duration) []Supernode {
	set := u.set.Load()
	if len(set.ids) == 1 {
		return []Supernode{set.nodes[set.ids[0]]}
	}
	var there, slow, away []Supernode
	for _, id := range route.Order(key, set.ids) {
		switch s := set.nodes[id]; {
		case s.Status() != nil:
			away = append(away, s)
		case len(there) == 0 && u.last(s, probe):
			slow = append(slow, s)
		default:
			there = append(there, s)
		}
	}
	return append(append(there, slow...), away...)
}

// Status returns nil if a supernode can be reached now, or why one of them cannot.
func (u *Uplink) Status() error {
	var err error
	for _, s := range u.set.Load().nodes {
		if err = s.Status(); err == nil {
			return nil
		}
	}
	return err
}

// Away says whether no supernode could be reached for longer than d, or since the
// Uplink was made.
func (u *Uplink) Away(d time.Duration) bool {
	for _, s := range u.set.Load().nodes {
		if s.Gone() <= d {
			return false
		}
	}
	return true
}

// next says whether to ask the next supernode after this error.
func next(ctx context.Context, err error) bool {
	return ctx.Err() == nil && (errors.Is(err, blockdev.ErrUnavailable) || errors.Is(err, blockdev.ErrNotFound) || errors.Is(err, blockdev.ErrCorrupt))
}

// minBusy and maxBusy are the pauses before supernodes are asked again that all have
// too much to do.
const (
	minBusy = 50 * time.Millisecond
	maxBusy = 2 * time.Second
)

// converse asks supernodes for an image or a document until one answers, and again
// while all have too much to do. Where there is one, its client does that.
func (u *Uplink) converse(ctx context.Context, key blockdev.Digest, after time.Duration, do ask) error {
	for pause := minBusy; ; pause = min(2*pause, maxBusy) {
		order := u.order(key, after)
		if len(order) == 1 {
			return do(ctx, order[0], nil)
		}
		err := u.race(ctx, order, way{after: after}, do)
		if !errors.Is(err, wire.ErrBusy) || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-ctx.Done():
			return fmt.Errorf("%w, until the last: %w", ctx.Err(), err)
		}
	}
}

// imageKey names what an image belongs to a supernode by.
func imageKey(ref string, manifest blockdev.Digest) blockdev.Digest {
	if manifest != (blockdev.Digest{}) {
		return manifest
	}
	return blockdev.Sum([]byte(ref))
}

// FetchIndexes implements image.Source.
func (u *Uplink) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	var got answered[*image.Image]
	var turn sync.Mutex // one call of Progress at a time
	progress, alive := req.Progress, req.Alive
	err := u.converse(ctx, imageKey(req.Ref, req.Manifest), imageHedge, func(ctx context.Context, s Supernode, sign func()) error {
		req := req
		req.Alive = both(alive, sign)
		if progress != nil {
			req.Progress = func(p image.Progress) {
				turn.Lock()
				defer turn.Unlock()
				progress(p)
			}
		}
		img, err := s.FetchIndexes(ctx, req)
		if err == nil && got.take(img) {
			u.note(img, s)
		}
		return err
	})
	return got.result(err)
}

// answered keeps the first answer.
type answered[T any] struct {
	mu   sync.Mutex
	have bool
	v    T
}

func (a *answered[T]) take(v T) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.have {
		return false
	}
	a.have, a.v = true, v
	return true
}

// result is what was answered, if err is nil.
func (a *answered[T]) result(err error) (T, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		var none T
		return none, err
	}
	return a.v, nil
}

// both calls two functions, each of which may be nil.
func both(a, b func()) func() {
	if a == nil || b == nil {
		if a == nil {
			return b
		}
		return a
	}
	return func() { a(); b() }
}

func (u *Uplink) note(img *image.Image, s Supernode) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.from) > maxFrom {
		clear(u.from)
	}
	for i := range img.Layers {
		u.from[img.Layers[i].DiffID] = s
	}
}

// ReportProfiles implements blockdev.ProfileSink. Profiles of a diff that no
// supernode has given out since this process began go to its owner, which may
// refuse them.
func (u *Uplink) ReportProfiles(ctx context.Context, profiles []blockdev.DiffProfile) error {
	to := map[Supernode][]blockdev.DiffProfile{}
	for _, p := range profiles {
		u.mu.Lock()
		s := u.from[p.Diff]
		u.mu.Unlock()
		if order := u.order(p.Diff, 0); !slices.Contains(order, s) {
			s = order[0]
		}
		to[s] = append(to[s], p)
	}
	var errs []error
	for s, list := range to {
		errs = append(errs, s.ReportProfiles(ctx, list))
	}
	return errors.Join(errs...)
}

// Document implements image.DocumentSource.
func (u *Uplink) Document(ctx context.Context, req image.DocumentRequest) (*image.Document, error) {
	var got answered[*image.Document]
	alive := req.Alive
	err := u.converse(ctx, imageKey(req.Ref, blockdev.Digest{}), documentHedge, func(ctx context.Context, s Supernode, sign func()) error {
		req := req
		req.Alive = both(alive, sign)
		doc, err := s.Document(ctx, req)
		if err == nil {
			got.take(doc)
		}
		return err
	})
	return got.result(err)
}
