package slots

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/shoalfs/shoal/blockdev"
)

func TestOneKeyTakesNobodyAlong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(2, 4)
		take := func(key string) (got chan func()) {
			got = make(chan func(), 1)
			go func() {
				release, err := s.Take(t.Context(), key)
				if err == nil {
					got <- release
				}
			}()
			synctest.Wait()
			return got
		}
		has := func(c chan func()) bool { return len(c) > 0 }
		slow1, slow2, slow3 := take("slow"), take("slow"), take("slow")
		if !has(slow1) || !has(slow2) || has(slow3) {
			t.Error("not two places for one key")
		}
		other, other2, third, fourth := take("other"), take("other"), take("third"), take("fourth")
		if !has(other) || has(other2) || !has(third) || has(fourth) {
			t.Error("not one place for each key that has none, up to four in all")
		}
		if u := s.Use(); u != (blockdev.Use{Used: 4, Waiting: 3, Capacity: 2}) {
			t.Errorf("in use: %+v", u)
		}
		(<-other)()
		synctest.Wait()
		// The next in line whose key has none.
		if has(slow3) || !has(other2) || has(fourth) {
			t.Error("the wrong one is next")
		}
		for _, c := range []chan func(){slow1, slow2, third, other2} {
			release := <-c
			release()
			release() // once more is nothing
		}
		synctest.Wait()
		if !has(slow3) || !has(fourth) {
			t.Error("free places, and somebody waits")
		}
		(<-slow3)()
		(<-fourth)()
		if s.used != 0 || len(s.byKey) != 0 || len(s.queue) != 0 {
			t.Errorf("left: %d %v %v", s.used, s.byKey, s.queue)
		}
	})
}

func TestWhoLeavesTakesNothing(t *testing.T) {
	s := New(1, 1)
	release, err := s.Take(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	why := errors.New("why")
	var wg sync.WaitGroup
	for range 50 {
		ctx, cancel := context.WithCancelCause(t.Context())
		wg.Go(func() {
			if _, err := s.Take(ctx, "b"); !errors.Is(err, why) {
				t.Errorf("%v", err)
			}
		})
		cancel(why)
	}
	wg.Wait()
	release()
	// Leaving and getting it at the same time.
	for range 200 {
		release, err := s.Take(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			if release, err := s.Take(ctx, "b"); err == nil {
				release()
			}
		})
		go cancel()
		release()
		wg.Wait()
		cancel()
	}
	if s.used != 0 || len(s.queue) != 0 {
		t.Errorf("left: %d %v", s.used, s.queue)
	}
}

// TestRanks: who has had a place waits behind those that have not.
func TestRanks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(1, 1)
		release, err := s.Take(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		var order []string
		for _, w := range []struct {
			name string
			rank int
		}{{"again", 1}, {"first", 0}, {"a third time", 2}, {"second", 0}, {"again, too", 1}} {
			go func() {
				release, err := s.TakeRanked(t.Context(), "a", w.rank)
				if err != nil {
					t.Error(err)
					return
				}
				order = append(order, w.name)
				release()
			}()
			synctest.Wait()
		}
		if n := s.Waiting(); n != 5 {
			t.Errorf("%d wait", n)
		}
		release()
		synctest.Wait()
		if got := strings.Join(order, ", "); got != "first, second, again, again, too, a third time" || s.Waiting() != 0 {
			t.Error(got)
		}
	})
}
