package layers

import (
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// Leases keep diffs that were asked for from being evicted for a while: a node
// that has an index will come for the chunks. There is one for each diff at the
// most, and only for diffs that are stored.
type Leases struct {
	term time.Duration
	stop chan struct{}
	wg   sync.WaitGroup

	mu   sync.Mutex
	held map[blockdev.Digest]*lease
}

type lease struct {
	until   time.Time
	release func()
	users   int // requests that collect an image that the diff is part of
}

// NewLeases returns leases for a term each, and ends them when it is over.
func NewLeases(term time.Duration) *Leases {
	l := &Leases{term: term, stop: make(chan struct{}), held: map[blockdev.Digest]*lease{}}
	l.wg.Go(func() {
		t := time.NewTicker(max(term/16, time.Millisecond))
		defer t.Stop()
		for {
			select {
			case <-l.stop:
				return
			case now := <-t.C:
				l.expire(now)
			}
		}
	})
	return l
}

// take holds a diff that is stored, from now on for the term. Until done is called
// the lease is not given up early either: an image must not evict its own layers.
func (l *Leases) take(d blockdev.Digest, pin func(blockdev.Digest) (release func())) (done func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.held[d]
	if h == nil {
		h = &lease{release: pin(d)}
		l.held[d] = h
	}
	h.until = time.Now().Add(l.term)
	h.users++
	return sync.OnceFunc(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		h.users--
	})
}

// expire lets go what has been held long enough.
func (l *Leases) expire(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for d, h := range l.held {
		if h.users == 0 && now.After(h.until) {
			l.endLocked(d, h)
		}
	}
}

// Yield ends the oldest lease, because the store is full of leased diffs; false:
// all of them are part of an image that is being collected now.
func (l *Leases) Yield() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	var oldest blockdev.Digest
	var found *lease
	for d, h := range l.held {
		if h.users == 0 && (found == nil || h.until.Before(found.until)) {
			oldest, found = d, h
		}
	}
	if found == nil {
		return false
	}
	l.endLocked(oldest, found)
	return true
}

func (l *Leases) endLocked(d blockdev.Digest, h *lease) {
	h.release()
	delete(l.held, d)
}

// Close ends all leases.
func (l *Leases) Close() error {
	close(l.stop)
	l.wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	for d, h := range l.held {
		l.endLocked(d, h)
	}
	return nil
}
