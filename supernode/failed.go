package supernode

import (
	"errors"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// failures remembers layers that cannot be had however often one tries, so that
// a thousand nodes that ask for a broken image make it be fetched once.
type failures struct {
	now func() time.Time

	mu   sync.Mutex
	errs map[string]failure
}

type failure struct {
	err   error
	until time.Time
}

const maxFailures = 4096

// failureTTL is how long an error counts; 0 for those that may pass at any time.
func failureTTL(err error) time.Duration {
	switch {
	case errors.Is(err, blockdev.ErrUnavailable):
		return 0 // whatever else it is
	case errors.Is(err, blockdev.ErrCorrupt):
		return time.Minute // a registry can be repaired
	case errors.Is(err, blockdev.ErrUnsupported):
		return 5 * time.Minute
	case errors.Is(err, blockdev.ErrNoSpace):
		return 15 * time.Second
	}
	return 0
}

func (f *failures) note(key string, err error) {
	ttl := failureTTL(err)
	if ttl == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	if len(f.errs) >= maxFailures {
		for k, e := range f.errs {
			if now.After(e.until) || len(f.errs) >= maxFailures {
				delete(f.errs, k)
			}
		}
	}
	f.errs[key] = failure{err, now.Add(ttl)}
}

func (f *failures) recall(key string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	e, ok := f.errs[key]
	if !ok || f.now().After(e.until) {
		return nil
	}
	return e.err
}
