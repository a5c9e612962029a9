package layers

import (
	"fmt"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/lru"
)

// TestFailures: what fails again is left alone for longer each time, whoever and however
// many say that it has failed.
func TestFailures(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	f := failures{now: func() time.Time { return now }, errs: lru.New[string, failure](maxFailures)}
	counts := func(key string) (ttl time.Duration) {
		for at := now; ; at = at.Add(time.Second) {
			if now.After(at) {
				continue
			}
			saved := now
			now = at
			err := f.recall(key)
			now = saved
			if err == nil {
				return at.Sub(now) - time.Second
			}
		}
	}
	for kind, want := range map[error][]time.Duration{
		blockdev.ErrCorrupt:     {1 * time.Minute, 2 * time.Minute, 4 * time.Minute, 8 * time.Minute, 16 * time.Minute, 32 * time.Minute, time.Hour, time.Hour},
		blockdev.ErrUnsupported: {5 * time.Minute, 10 * time.Minute, 20 * time.Minute, 40 * time.Minute, 80 * time.Minute, 160 * time.Minute, 320 * time.Minute, 6 * time.Hour},
		blockdev.ErrNoSpace:     {15 * time.Second, 15 * time.Second},
	} {
		key := kind.Error()
		for i, want := range want {
			for range 1000 { // all who have waited for it
				f.note(key, fmt.Errorf("layer: %w", kind))
			}
			if got := counts(key); got != want {
				t.Errorf("%v, time %d: counts for %v, want %v", kind, i, got, want)
			}
			now = now.Add(want + time.Second)
		}
		f.worked(key)
		f.note(key, kind)
		if got := counts(key); got != want[0] {
			t.Errorf("%v: after it has worked: %v", kind, got)
		}
		now = now.Add(want[0] + failureMemory + time.Second)
		f.note(key, kind)
		if got := counts(key); got != want[0] {
			t.Errorf("%v: a day later: %v", kind, got)
		}
	}
	f.note("other", fmt.Errorf("%w: %w", blockdev.ErrUnavailable, blockdev.ErrCorrupt))
	if err := f.recall("other"); err != nil {
		t.Errorf("an outage counts: %v", err)
	}
	for i := range 2 * maxFailures {
		f.note(fmt.Sprint(i), blockdev.ErrCorrupt)
	}
	if f.errs.Len() > maxFailures {
		t.Errorf("%d failures are remembered", f.errs.Len())
	}
}
