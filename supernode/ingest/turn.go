package ingest

import (
	"context"
	"errors"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/supernode/slots"
)

// fly takes the layer through, in as many turns as that takes.
func (f *arrival) fly(ctx context.Context) error {
	return slots.Turns(ctx, f.turn, func() {
		f.to(image.StageWaiting)
		f.in.stats.yields.Add(1)
		f.in.cfg.Log.Warn("a registry sends a layer slowly while other layers wait; the download goes on after them", "image", f.l.Ref,
			"layer", f.l.Digest, "at", f.fetched.Load(), "size", f.l.Size)
	})
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
	tctx, stop := f.pace(ctx, n)
	defer stop()
	err = f.through(tctx, sf, &pieced)
	if pieced && errors.Is(err, blockdev.ErrCorrupt) && tctx.Err() == nil {
		// The seam may be the cause: a power failure can leave garbage at the end of
		// the spool file, and a registry may answer a range request with something
		// else. Again, all of it from the registry.
		f.in.cfg.Log.Warn("a layer is wrong after its download was resumed; fetching all of it again", "image", f.l.Ref, "layer", f.l.Digest, "error", err)
		if err = sf.restart(); err == nil {
			err = f.through(tctx, sf, &pieced)
		}
	}
	// What is wrong in itself is not kept; what a later attempt can go on with is.
	keep := err != nil && !errors.Is(err, blockdev.ErrCorrupt) && !errors.Is(err, blockdev.ErrUnsupported)
	if cerr := sf.giveUp(keep); cerr != nil {
		f.in.cfg.Log.Warn("cannot release a spool file", "layer", f.l.Digest, "error", cerr)
	}
	return err
}

// board takes a place and room in the spool. It waits for the one without having the
// other, so that a layer that lacks room keeps no other from a place.
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
// that has had turns gets longer ones: what is in its spool file is unpacked again in
// each.
func (f *arrival) pace(ctx context.Context, turn int) (_ context.Context, stop func()) {
	places, p := f.in.places(f.l.Size), f.in.Pace()
	p.Turn <<= min(turn, maxTurnShift)
	return p.Keep(ctx, f.fetched.Load, func() bool {
		return f.at() == image.StageFetching && (places.Waiting() > 0 || f.in.spool.waiting.Load() > 0)
	})
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
