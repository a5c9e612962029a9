package prefetch

import (
	"context"
	"sync"
	"time"
)

// Rate keeps what prefetch gets from the Source to Config.PrefetchRate, in the whole
// Cache: the next request waits for as long as what has come should have taken.
// What is under way then is bounded by the window.
type Rate struct {
	mu    sync.Mutex
	limit int64     // bytes a second; 0: none
	next  time.Time // when what has come is paid for
}

// Set changes the limit. What has come under the one before is paid for.
func (r *Rate) Set(limit int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.limit, r.next = limit, time.Time{}
}

// rateBurst is for how long a link that was idle may be used in full.
const rateBurst = 50 * time.Millisecond

// Came counts n bytes.
func (r *Rate) Came(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.limit <= 0 {
		return
	}
	if least := time.Now().Add(-rateBurst); r.next.Before(least) {
		r.next = least
	}
	r.next = r.next.Add(time.Duration(float64(n) / float64(r.limit) * float64(time.Second)))
}

// wait returns when another request may be sent.
func (r *Rate) wait(ctx context.Context) error {
	r.mu.Lock()
	left := time.Until(r.next)
	r.mu.Unlock()
	return sleep(ctx, left)
}

// sleep waits for d, or until ctx ends, with its cause.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
