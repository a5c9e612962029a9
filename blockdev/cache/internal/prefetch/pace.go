package prefetch

import (
	"context"
	"math"
	"time"
)

// Pace says when prefetch may send its next request, and for how many bytes.
type Pace struct {
	Gate     Gate
	Inflight *Inflight
	Rate     Rate
	Trickle  Trickle
	Arrivals Arrivals
}

// New makes a Pace of cache.Config's Quiet, GiveWay, Inflight and PrefetchRate.
func New(quiet, giveWay time.Duration, most func() int64, rateLimit int64) *Pace {
	return &Pace{Gate: Gate{quiet: quiet, giveWay: giveWay, pressed: pressed}, Inflight: newInflight(most), Rate: Rate{limit: rateLimit}}
}

// Next waits until a request may be sent and returns for how many bytes. hurry: the
// rate does not count, and containers that start share the processors with it. The caller
// counts what it asks for by Inflight.Take.
func (p *Pace) Next(ctx context.Context, hurry bool) (int64, error) {
	if !hurry {
		if err := p.Rate.wait(ctx); err != nil {
			return 0, err
		}
		if err := sleep(ctx, p.Gate.crowded()); err != nil {
			return 0, err
		}
	}
	calm, err := p.Gate.Wait(ctx)
	if err != nil {
		return 0, err
	}
	size := int64(math.MaxInt64)
	if !calm {
		size = p.Trickle.bytes(p.Gate.giveWay)
	}
	return p.Inflight.room(ctx, size)
}
