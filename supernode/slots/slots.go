// Package slots bounds how much is done side by side without letting one origin
// hold up others: an origin that is slow, or sends a byte now and then, keeps its own
// work waiting.
//
// # Invariants
//
//   - At most n pieces of work run, and one more for each key that has none
//     running, up to most in all.
//   - Waiters are served in the order of rank, and within a rank in that of coming,
//     but for those whose key has to wait anyway.
//   - Waiting costs a goroutine and nothing else.
//   - Work with a Pace has a place for one Turn at least, and for longer only if it is fast
//     enough or nothing waits. It goes on behind work that has had fewer turns.
package slots

import (
	"context"
	"slices"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
)

// Slots are places for work. All methods may be called from any goroutine.
type Slots struct {
	n, most int

	mu    sync.Mutex
	used  int
	byKey map[string]int
	queue []*waiter
}

type waiter struct {
	key  string
	rank int
	got  chan struct{} // closed when the place is the waiter's
}

// New returns n places (at least one), and up to most with those for keys that have
// none.
func New(n, most int) *Slots {
	n = max(n, 1)
	return &Slots{n: n, most: max(most, n), byKey: map[string]int{}}
}

// Use returns how many places are taken and waited for, and how many there are for work
// of any key.
func (s *Slots) Use() blockdev.Use {
	s.mu.Lock()
	defer s.mu.Unlock()
	return blockdev.Use{Used: int64(s.used), Waiting: int64(len(s.queue)), Capacity: int64(s.n)}
}

// Take waits for a place for key, until ctx ends; release gives it back, and may be
// called more than once. The error is ctx's cause.
func (s *Slots) Take(ctx context.Context, key string) (release func(), err error) {
	return s.TakeRanked(ctx, key, 0)
}

// TakeRanked is Take for a caller that waits after all of a lower rank: behind those,
// say, that have not had a place yet.
func (s *Slots) TakeRanked(ctx context.Context, key string, rank int) (release func(), err error) {
	s.mu.Lock()
	w := &waiter{key: key, rank: rank, got: make(chan struct{})}
	i := len(s.queue)
	for i > 0 && s.queue[i-1].rank > rank {
		i--
	}
	s.queue = slices.Insert(s.queue, i, w)
	s.grantLocked()
	s.mu.Unlock()
	select {
	case <-w.got:
	default:
		select {
		case <-w.got:
		case <-ctx.Done():
			s.mu.Lock()
			defer s.mu.Unlock()
			if i := slices.Index(s.queue, w); i >= 0 {
				s.queue = slices.Delete(s.queue, i, i+1)
			} else {
				s.putLocked(key)
			}
			return nil, context.Cause(ctx)
		}
	}
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.putLocked(key)
	}), nil
}

// Waiting is how many wait for a place.
func (s *Slots) Waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.queue)
}

func (s *Slots) putLocked(key string) {
	s.used--
	if s.byKey[key]--; s.byKey[key] == 0 {
		delete(s.byKey, key)
	}
	s.grantLocked()
}

// grantLocked gives places to the waiters that may have them now.
func (s *Slots) grantLocked() {
	s.queue = slices.DeleteFunc(s.queue, func(w *waiter) bool {
		if s.used >= s.n && (s.byKey[w.key] > 0 || s.used >= s.most) {
			return false
		}
		s.used++
		s.byKey[w.key]++
		close(w.got)
		return true
	})
}
