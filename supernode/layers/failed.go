package layers

import (
	"errors"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/lru"
)

// failures remembers layers that cannot be had however often one tries, so that
// a thousand nodes that ask for a broken image make it be fetched once, and those that
// come back for it every few minutes now and then.
type failures struct {
	now func() time.Time

	mu   sync.Mutex
	errs *lru.Map[string, failure]
}

type failure struct {
	err   error
	until time.Time
	ttl   time.Duration // that until was set by
}

const (
	maxFailures = 4096
	// failureMemory is for how long a failure that does not count any more makes the next
	// one of the same layer count twice as long.
	failureMemory = 24 * time.Hour
)

// failureTTL is how long the first error of a kind counts, 0 for those that may pass at
// any time, and how long each further one does at most.
func failureTTL(err error) (first, most time.Duration) {
	switch {
	case errors.Is(err, blockdev.ErrUnavailable):
		return 0, 0 // whatever else it is
	case errors.Is(err, blockdev.ErrCorrupt):
		return time.Minute, time.Hour // a registry can be repaired
	case errors.Is(err, blockdev.ErrUnsupported):
		return 5 * time.Minute, 6 * time.Hour // these bytes stay as they are
	case errors.Is(err, blockdev.ErrNoSpace):
		return 15 * time.Second, 15 * time.Second
	}
	return 0, 0
}

// note remembers an error. Of all callers that have waited for the same attempt, the first to
// say so counts.
func (f *failures) note(key string, err error) {
	ttl, most := failureTTL(err)
	if ttl == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	old, again := f.errs.Get(key)
	switch {
	case again && !now.After(old.until):
		return
	case again && !old.over(now):
		ttl = min(max(2*old.ttl, ttl), most)
	}
	f.errs.Add(key, failure{err, now.Add(ttl), ttl})
}

// over says that a failure is not even history any more.
func (e failure) over(now time.Time) bool { return now.After(e.until.Add(failureMemory)) }

// recall returns the error that counts now.
func (f *failures) recall(key string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	e, ok := f.errs.Get(key)
	if !ok || f.now().After(e.until) {
		return nil
	}
	return e.err
}

// worked says that a layer is no failure any more.
func (f *failures) worked(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.errs.Remove(key)
}
