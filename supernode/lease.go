package supernode

import (
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// leases keep diffs that were asked for from being evicted for a while: a node
// that has an index will come for the chunks.
type leases struct {
	pin  func(blockdev.Digest) (release func())
	term time.Duration
	stop chan struct{}
	wg   sync.WaitGroup

	mu   sync.Mutex
	held map[blockdev.Digest]*lease
}

type lease struct {
	until   time.Time
	release func()
}

func newLeases(pin func(blockdev.Digest) func(), term time.Duration) *leases {
	l := &leases{pin: pin, term: term, stop: make(chan struct{}), held: map[blockdev.Digest]*lease{}}
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

// take holds a diff from now on for the term.
func (l *leases) take(d blockdev.Digest) {
	until := time.Now().Add(l.term)
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.held[d]; h != nil {
		h.until = until
		return
	}
	l.held[d] = &lease{until: until, release: l.pin(d)}
}

// expire lets go what has been held long enough.
func (l *leases) expire(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for d, h := range l.held {
		if now.After(h.until) {
			h.release()
			delete(l.held, d)
		}
	}
}

func (l *leases) close() {
	close(l.stop)
	l.wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	for d, h := range l.held {
		h.release()
		delete(l.held, d)
	}
}
