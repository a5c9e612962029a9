package exchange

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestKeeperHurries: who waits for a server does not wait for a long back-off, and does
// not have a server that is down dialed all the time either.
func TestKeeperHurries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &keeper{ctx: t.Context(), wanted: make(chan struct{}, 1)}
		rest := func(backoff, asked time.Duration) time.Duration {
			began := time.Now()
			if asked >= 0 {
				time.AfterFunc(asked, k.hurry)
			}
			if !k.rest(backoff) {
				t.Fatal("rest ended before its time")
			}
			return time.Since(began)
		}
		for _, c := range []struct {
			name           string
			backoff, asked time.Duration
			least, most    time.Duration
			waits          bool
		}{
			{"nobody waits", time.Hour, -1, time.Hour / 2, time.Hour, false},
			{"somebody waits", time.Hour, 0, hurried / 2, hurried, true},
			{"somebody comes late", time.Hour, time.Minute, time.Minute, time.Minute, true},
			{"a short back-off", minBackoff, 0, minBackoff / 2, minBackoff, true},
		} {
			k.dialing = nil
			if took := rest(c.backoff, c.asked); took < c.least || took > c.most {
				t.Errorf("%s: the next attempt comes after %v, want %v to %v", c.name, took, c.least, c.most)
			}
			if waits := k.dialing != nil; waits != c.waits {
				t.Errorf("%s: ready waits for the next attempt: %v", c.name, waits)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		k.ctx = ctx
		time.AfterFunc(time.Second, cancel)
		if k.rest(time.Hour) {
			t.Error("rest outlives its keeper")
		}
		k.up = true
		k.hurry()
		if len(k.wanted) != 0 {
			t.Error("a keeper that is connected is told to hurry")
		}
	})
}
