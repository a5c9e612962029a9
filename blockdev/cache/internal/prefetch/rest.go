package prefetch

import (
	"context"
	"time"
)

// restBytes is after how many bytes work in the background looks whether it is in
// anybody's way.
const restBytes = 1 << 20

// Rest keeps work on local data in the background: it waits for demand reads,
// and rests for as long as it has worked.
type Rest struct {
	gate  *Gate
	hurry func() bool
	rate  int64     // bytes per second at most; 0: any
	began time.Time // of the portion
	bytes int
}

// NewRest is for one pass over the data. rate bounds it, in bytes per second; 0: it does
// not. While hurry returns true, it does not rest.
func NewRest(g *Gate, hurry func() bool, rate int64) *Rest {
	return &Rest{gate: g, hurry: hurry, rate: rate, began: time.Now()}
}

// Wait is called before the next n bytes are worked on.
func (r *Rest) Wait(ctx context.Context, n int) error {
	if r.bytes += n; r.bytes < restBytes {
		return nil
	}
	worked := time.Since(r.began)
	pause := min(worked, r.gate.giveWay)
	if r.rate > 0 {
		pause = max(pause, time.Duration(int64(r.bytes)*int64(time.Second)/r.rate)-worked)
	}
	r.bytes = 0
	if !r.hurry() {
		if err := sleep(ctx, max(pause, r.gate.crowded())); err != nil {
			return err
		}
	}
	_, err := r.gate.Wait(ctx)
	r.began = time.Now()
	return err
}
