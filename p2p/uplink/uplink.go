package uplink

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/route"
)

// Supernode is one of them: an *exchange.Client.
type Supernode interface {
	blockdev.Source
	blockdev.ImageSource
	blockdev.DocumentSource
	blockdev.ProfileSink
	// Status returns nil if it can be reached.
	Status() error
	Close() error
}

// Uplink asks supernodes, one after the other.
type Uplink struct {
	ids   []peer.ID
	nodes map[peer.ID]Supernode

	mu sync.Mutex
	// from says who gave out a diff's index: who is told what containers read of
	// it, and hands that out with the image again.
	from map[blockdev.Digest]Supernode
}

// maxFrom bounds Uplink.from.
const maxFrom = 16384

var (
	_ blockdev.Source         = (*Uplink)(nil)
	_ blockdev.ImageSource    = (*Uplink)(nil)
	_ blockdev.DocumentSource = (*Uplink)(nil)
	_ blockdev.ProfileSink    = (*Uplink)(nil)
)

// New returns an Uplink to these supernodes, at least one.
func New(nodes map[peer.ID]Supernode) (*Uplink, error) {
	if len(nodes) == 0 {
		return nil, errors.New("uplink: no supernode")
	}
	u := &Uplink{nodes: nodes, from: map[blockdev.Digest]Supernode{}}
	for id := range nodes {
		u.ids = append(u.ids, id)
	}
	return u, nil
}

// Close closes all of them.
func (u *Uplink) Close() error {
	var errs []error
	for _, s := range u.nodes {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// order lists the supernodes as they are to be asked: those that are there first.
func (u *Uplink) order(key blockdev.Digest) []Supernode {
	if len(u.ids) == 1 {
		return []Supernode{u.nodes[u.ids[0]]}
	}
	var there, away []Supernode
	for _, id := range route.Order(key, u.ids) {
		if s := u.nodes[id]; s.Status() == nil {
			there = append(there, s)
		} else {
			away = append(away, s)
		}
	}
	return append(there, away...)
}

// next says whether to ask the next supernode after this error.
func next(ctx context.Context, err error) bool {
	return ctx.Err() == nil && (errors.Is(err, blockdev.ErrUnavailable) || errors.Is(err, blockdev.ErrNotFound) || errors.Is(err, blockdev.ErrCorrupt))
}

// each asks supernodes until one answers. The error is the first one's that was
// there: it says most.
func (u *Uplink) each(ctx context.Context, key blockdev.Digest, ask func(Supernode) error) error {
	var first error
	for _, s := range u.order(key) {
		err := ask(s)
		if err == nil {
			return nil
		}
		if first == nil {
			first = err
		}
		if !next(ctx, err) {
			return err
		}
	}
	return first
}

// imageKey names what an image belongs to a supernode by.
func imageKey(ref string, manifest blockdev.Digest) blockdev.Digest {
	if manifest != (blockdev.Digest{}) {
		return manifest
	}
	return blockdev.Sum([]byte(ref))
}

// OpenImage implements blockdev.ImageSource.
func (u *Uplink) OpenImage(ctx context.Context, req blockdev.ImageRequest) (img *blockdev.Image, err error) {
	err = u.each(ctx, imageKey(req.Ref, req.Manifest), func(s Supernode) error {
		if img, err = s.OpenImage(ctx, req); err == nil {
			u.note(img, s)
		}
		return err
	})
	return img, err
}

func (u *Uplink) note(img *blockdev.Image, s Supernode) {
	if len(u.ids) == 1 {
		return
	}
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
		if s == nil {
			s = u.order(p.Diff)[0]
		}
		to[s] = append(to[s], p)
	}
	var errs []error
	for s, list := range to {
		errs = append(errs, s.ReportProfiles(ctx, list))
	}
	return errors.Join(errs...)
}

// Document implements blockdev.DocumentSource.
func (u *Uplink) Document(ctx context.Context, req blockdev.DocumentRequest) (doc *blockdev.Document, err error) {
	err = u.each(ctx, imageKey(req.Ref, blockdev.Digest{}), func(s Supernode) error {
		doc, err = s.Document(ctx, req)
		return err
	})
	return doc, err
}

// Fetch implements blockdev.Source.
func (u *Uplink) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	if len(u.ids) == 1 {
		return u.nodes[u.ids[0]].Fetch(ctx, req, deliver)
	}
	f := fetch{left: make([]int, len(req.Chunks)), deliver: deliver}
	for i := range f.left {
		f.left[i] = i
	}
	err := u.each(ctx, req.Diff, func(s Supernode) error {
		if f.failed != nil {
			return f.failed // whatever it wraps: no other supernode can help
		}
		return f.from(ctx, s, req)
	})
	if f.failed != nil {
		return f.failed
	}
	return err
}

// fetch is one call of Fetch.
type fetch struct {
	left    []int // positions in the request that are not delivered yet
	deliver blockdev.Deliver
	failed  error // of deliver, and none of the sender's making
}

// from gets what is left from s.
func (f *fetch) from(ctx context.Context, s Supernode, req blockdev.Request) error {
	chunks := make([]blockdev.Chunk, len(f.left))
	for i, at := range f.left {
		chunks[i] = req.Chunks[at]
	}
	got := make([]bool, len(chunks))
	req.Chunks = chunks
	err := s.Fetch(ctx, req, func(i int, data []byte) error {
		err := f.deliver(f.left[i], data)
		switch {
		case err == nil:
			got[i] = true
		case !errors.Is(err, blockdev.ErrCorrupt):
			f.failed = err
		}
		return err
	})
	rest := f.left[:0:0]
	for i, at := range f.left {
		if !got[i] {
			rest = append(rest, at)
		}
	}
	f.left = rest
	if err == nil && len(f.left) > 0 {
		err = fmt.Errorf("%d chunks were not delivered: %w", len(f.left), blockdev.ErrCorrupt)
	}
	if err != nil && len(f.left) == 0 {
		return nil
	}
	return err
}
