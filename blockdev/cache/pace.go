package cache

import (
	"context"
	"math"
	"time"
)

// pace says when prefetch may send its next request, and for how many bytes.
type pace struct {
	gate     gate
	inflight *inflight
	rate     rate
	trickle  trickle
	arrivals arrivals
}

// newPace makes a pace of Config's Quiet, GiveWay, Window and PrefetchRate.
func newPace(quiet, giveWay time.Duration, window func() int64, rateLimit int64) *pace {
	return &pace{gate: gate{quiet: quiet, giveWay: giveWay}, inflight: newInflight(window), rate: rate{limit: rateLimit}}
}

// next waits until a request may be sent and returns for how many bytes. hurry: the
// rate does not count. The caller counts what it asks for by inflight.take.
func (p *pace) next(ctx context.Context, hurry bool) (int64, error) {
	if !hurry {
		if err := p.rate.wait(ctx); err != nil {
			return 0, err
		}
	}
	calm, err := p.gate.wait(ctx)
	if err != nil {
		return 0, err
	}
	size := int64(math.MaxInt64)
	if !calm {
		size = p.trickle.bytes(p.gate.giveWay)
	}
	return p.inflight.room(ctx, size)
}
