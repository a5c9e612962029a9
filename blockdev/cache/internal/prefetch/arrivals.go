package prefetch

import (
	"sync/atomic"
	"time"
)

// Arrivals knows when startup chunks came, of any diff. They come in the order in
// which they are about to be read, so a demand read that waits for one of them
// gains nothing by asking again as long as the link is busy with them: it would
// end their request, and lose what is on its way.
type Arrivals struct {
	last atomic.Int64 // Unix nanoseconds
}

// Note says that a startup chunk has come.
func (a *Arrivals) Note(now time.Time) { a.last.Store(now.UnixNano()) }

// startupPatience is how many times Config.Promote a read waits for a startup
// chunk at most: others may come while the machine that owes this one is dead.
const startupPatience = 10

// Patience returns how long a read that has waited since began goes on waiting
// before it looks again; 0: no longer. Startup chunks must have come within the
// last promote.
func (a *Arrivals) Patience(now, began time.Time, promote time.Duration) time.Duration {
	end := began.Add(startupPatience * promote)
	if due := time.Unix(0, a.last.Load()).Add(promote); due.Before(end) {
		end = due
	}
	return max(end.Sub(now), 0)
}
