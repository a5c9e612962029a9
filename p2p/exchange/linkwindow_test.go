package exchange

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestWindowBounds(t *testing.T) {
	w := NewLinkWindow()
	if !w.try(firstWindow - 1) {
		t.Fatal("an empty window has no room")
	}
	if w.try(2) {
		t.Error("more than the window is under way")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("removed")
	cancel(why)
	if err := w.acquire(ctx, 2); !errors.Is(err, why) {
		t.Errorf("cancelled: %v", err)
	}
	w.release(firstWindow - 1)
	if !w.try(10 * maxWindow) {
		t.Error("a request larger than any window never gets its turn")
	}
	w.release(10 * maxWindow)
	if w.used != 0 || len(w.queue) != 0 {
		t.Errorf("%d bytes and %d requests are left over", w.used, len(w.queue))
	}
}

// Who came first goes first, also before those that could go at once.
func TestWindowIsFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewLinkWindow()
		w.try(firstWindow)
		order := make(chan int, 3)
		for i := range 3 {
			go func() {
				if err := w.acquire(t.Context(), firstWindow); err != nil {
					t.Error(err)
				}
				order <- i
			}()
			synctest.Wait()
		}
		if w.try(1) {
			t.Error("one that comes later overtakes")
		}
		for want := range 3 {
			w.release(firstWindow)
			synctest.Wait()
			if got := <-order; got != want {
				t.Errorf("%d got its turn, want %d", got, want)
			}
		}
	})
}

func TestWindowAndDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewLinkWindow()
		w.demandBegins()
		begin := time.Now()
		if w.try(1) {
			t.Error("prefetch is asked for while a demand read waits")
		}
		if err := w.acquire(t.Context(), 1000); err != nil || time.Since(begin) != holdOff {
			t.Errorf("prefetch got its turn after %v (%v), want %v", time.Since(begin), err, holdOff)
		}
		w.demandEnds()
		if w.try(1000) {
			t.Error("two requests are under way right after a demand read")
		}
		if s := w.share(); s != 1 {
			t.Errorf("a request may ask for %d bytes right after a demand read, want one chunk", s)
		}
		time.Sleep(recent)
		if !w.try(1000) || w.share() != firstWindow/4 {
			t.Error("the demand read is not forgotten")
		}
	})
}

// The search on links of which the rate and the round trip are known.
func TestWindowSearch(t *testing.T) {
	const chunk = 64 << 10
	for _, link := range []struct {
		name        string
		rate        float64 // bytes a second
		rtt         time.Duration
		least, most int64 // what the window should come to
	}{
		{"datacenter", 125e6, 400 * time.Microsecond, minWindow, minWindow},
		{"slow server", 125e6, 4 * time.Millisecond, 512 << 10, 1 << 20},
		{"far away", 125e6, 20 * time.Millisecond, 2 << 20, 4 << 20},
		{"further than any window", 125e6, time.Second, maxWindow, maxWindow},
		{"modem", 1e4, 100 * time.Millisecond, minWindow, minWindow},
	} {
		t.Run(link.name, func(t *testing.T) {
			s, size := search{step: growing}, int64(firstWindow)
			now := time.Unix(0, 0)
			var settled int
			for range 200_000 {
				rate := min(link.rate, float64(size)/link.rtt.Seconds())
				now = now.Add(time.Duration(chunk / rate * 1e9))
				size = s.arrived(size, chunk, true, now)
				if s.step == calm {
					settled++
					if size < link.least || size > link.most {
						t.Fatalf("the window is %d, want %d to %d", size, link.least, link.most)
					}
				}
			}
			if settled == 0 {
				t.Error("the search never ends")
			}
		})
	}
	t.Run("little is wanted", func(t *testing.T) {
		s, size := search{step: growing}, int64(firstWindow)
		now := time.Unix(0, 0)
		for range 10_000 {
			now = now.Add(time.Millisecond)
			if size = s.arrived(size, chunk, false, now); size != firstWindow {
				t.Fatalf("a rate that says nothing makes the window %d", size)
			}
		}
	})
}
