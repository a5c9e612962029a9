package prefetch

import (
	"sync/atomic"
	"time"
)

// Trickle is how much prefetch asks for while demand reads go on: what takes a
// small part of the time, by the rate of the prefetch requests before. On a slow
// link a usual request would keep the readers waiting for as long as it takes.
type Trickle struct {
	rate atomic.Int64 // bytes per second
}

// trickleShare is that part of the time, inverted.
const trickleShare = 100

// Note takes what a request brought.
func (t *Trickle) Note(bytes int64, took time.Duration) {
	if bytes > 0 {
		t.rate.Store(int64(float64(bytes) / max(took, time.Microsecond).Seconds()))
	}
}

// bytes is for one request in every interval; 1, which is a chunk, before any rate
// is known.
func (t *Trickle) bytes(interval time.Duration) int64 {
	return max(int64(float64(t.rate.Load())*interval.Seconds()/trickleShare), 1)
}
