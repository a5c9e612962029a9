package swarm

import (
	"context"
	"fmt"
	"slices"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/route"
	"github.com/shoalfs/shoal/p2p/wire"
)

// Store is what a node has of its diffs: *volume.Manager.
type Store interface {
	// EncodedIndex returns the index of a diff, as it came. It wraps
	// blockdev.ErrNotFound if the diff is not here.
	EncodedIndex(diff blockdev.Digest) ([]byte, error)
	Forward(diff blockdev.Digest, prio blockdev.Priority, hops int, digests []blockdev.Digest) (*cache.Forward, error)
}

var (
	_ Store             = (*cache.Cache)(nil)
	_ exchange.Provider = (*provider)(nil)
	_ exchange.Answer   = (*answer)(nil)
	_ exchange.Images   = (*images)(nil)
)

// Provider returns what answers other nodes out of store.
func (s *Swarm) Provider(store Store) exchange.Provider { return &provider{s, store} }

type provider struct {
	s     *Swarm
	store Store
}

// Provide implements exchange.Provider. A peer that is not in the group, or asks for a diff
// that its image does not have, hears that there is nothing, which is what each peer
// hears that asks for what is not here.
func (p *provider) Provide(ctx context.Context, q *exchange.Query) (exchange.Answer, error) {
	if err := p.s.cfg.Groups.Allowed(ctx, q.Group, q.From); err != nil {
		p.s.metrics.refused.Inc()
		p.s.log.Debug("a peer asks for chunks of a group that it is not in", "peer", q.From, "group", q.Group, "error", err)
		return nil, fmt.Errorf("not here: %w", blockdev.ErrNotFound)
	}
	if !slices.Contains(p.s.cfg.Groups.Groups(q.Diff), q.Group) {
		// A member of a group may ask for the chunks of its image, not for those of
		// whatever else is here.
		return nil, fmt.Errorf("not here: %w", blockdev.ErrNotFound)
	}
	f, err := p.store.Forward(q.Diff, q.Priority, q.Hops, q.Digests)
	if err != nil {
		return nil, err
	}
	n := f.Missing()
	if n == 0 {
		return &answer{s: p.s, q: q, f: f}, nil
	}
	if q.Hops >= route.MaxHops {
		// The root of a tree asks those below it in this way. They may have asked
		// for the same chunk, up to that root: a request that waited for them would wait for
		// itself.
		return &answer{s: p.s, q: q, f: f, absent: errNotHere}, nil
	}
	if q.Priority == blockdev.Prefetch && p.s.cfg.Intake.Window.Hurried() {
		// Readers here wait for this node's link; a caller that does not wait may ask
		// somebody else.
		return &answer{s: p.s, q: q, f: f, absent: errReaders}, nil
	}
	p.s.metrics.forwarded.Add(float64(n))
	if err := f.Start(); err != nil {
		return nil, err
	}
	return &answer{s: p.s, q: q, f: f}, nil
}

type answer struct {
	s      *Swarm
	q      *exchange.Query
	f      *cache.Forward
	absent error // the answer for what is not here; nil: it is fetched
}

var errNotHere = fmt.Errorf("not on this node now: %w", blockdev.ErrNotFound)

var errReaders = fmt.Errorf("not on this node now, and its demand reads go first: %w", wire.ErrBusy)

// Chunk implements exchange.Answer.
func (a *answer) Chunk(ctx context.Context, i int) (exchange.Encoded, error) {
	if a.absent != nil && a.f.Absent(i) {
		return exchange.Encoded{}, a.absent
	}
	// A caller that has waited finds it there: it is kept before it is delivered.
	if a.f.Has(i) {
		if e, ok := a.s.cfg.Intake.Frames.Get(ctx, a.q.Digests[i]); ok {
			return e, nil
		}
	}
	var buf *[]byte
	data, err := a.f.Chunk(ctx, i, func(n int) []byte {
		if buf == nil {
			buf = a.s.buffers.Get(n)
		}
		return *buf
	})
	release := func() {
		if buf != nil {
			a.s.buffers.Put(buf)
		}
	}
	if err != nil {
		release()
		return exchange.Encoded{}, err
	}
	return exchange.Encoded{Data: data, Length: uint32(len(data)), Release: release}, nil
}

// Wait implements exchange.Answer.
func (a *answer) Wait(ctx context.Context, i int) {
	if a.absent == nil {
		a.f.Wait(ctx, i)
	}
}

// Close implements exchange.Answer.
func (a *answer) Close() {}

// NodeLimits are the limits of a node's exchange.Server: a node has a workload of
// its own to serve, so it says busy sooner than a supernode, and its buffers are
// bounded to some 50 MiB.
func NodeLimits() exchange.Limits {
	return exchange.Limits{
		DemandPerPeer: peerDemand, StartupPerPeer: peerStartup, PrefetchPerPeer: peerPrefetch + peerForwards, ImagesPerPeer: 2,
		Demand: 512, Startup: 512, Prefetch: 256, Images: 8, Waiting: 8, // an index is in memory as soon as it is opened
		ReadAhead: 2, TotalReadAhead: 96,
	}
}
