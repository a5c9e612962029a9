package pace

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

const chunkSize = blockdev.AvgChunk

func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(10 * chunkSize)
		begin := time.Now()
		for range 100 {
			if err := p.Take(t.Context(), "a", blockdev.Prefetch, chunkSize); err != nil {
				t.Fatal(err)
			}
		}
		// 100 chunks at 10 a second, of which the first few go at once.
		if took := time.Since(begin); took < 9*time.Second || took > 10*time.Second {
			t.Errorf("took %v", took)
		}
	})
	for _, none := range []*Pacer{nil, New(0)} {
		if err := none.Take(t.Context(), "a", blockdev.Demand, 1<<40); err != nil || none.Wait("a", blockdev.Demand) != 0 || none.Rate() != 0 {
			t.Error("no limit is a limit")
		}
	}
}

// TestSet: another rate counts for those that wait already, and none lets all of them go.
func TestSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(chunkSize)
		took := func() time.Duration {
			begin := time.Now()
			var all sync.WaitGroup
			for range 100 {
				all.Go(func() {
					if err := p.Take(t.Context(), "a", blockdev.Prefetch, chunkSize); err != nil {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
			all.Wait()
			return time.Since(begin)
		}
		time.AfterFunc(10*time.Second, func() { p.Set(100 * chunkSize) })
		if d := took(); d < 10*time.Second || d > 12*time.Second {
			t.Errorf("faster after 10 s: took %v", d)
		}
		p.Set(chunkSize)
		time.AfterFunc(10*time.Second, func() { p.Set(0) })
		if d := took(); d != 10*time.Second {
			t.Errorf("no limit after 10 s: took %v", d)
		}
		if d := took(); d != 0 {
			t.Errorf("no limit: took %v", d)
		}
		p.Set(100 * chunkSize)
		if d := took(); d < time.Second/2 || d > 2*time.Second {
			t.Errorf("a limit again: took %v", d)
		}
	})
}

// Each of several peers gets its share, however much one of them wants; and
// demand goes first.
func TestShares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(100 * chunkSize)
		ctx, cancel := context.WithCancel(t.Context())
		got := map[string]*int{"greedy": new(int), "modest": new(int), "reader": new(int)}
		want := func(id string, pr blockdev.Priority, several int) {
			for range several {
				go func() {
					for p.Take(ctx, id, pr, chunkSize) == nil {
						*got[id]++
					}
				}()
			}
		}
		want("greedy", blockdev.Prefetch, 16)
		want("modest", blockdev.Prefetch, 1)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if g, m := *got["greedy"], *got["modest"]; g > m+m/10+20 || g < m-m/10-20 {
			t.Errorf("one with 16 requests got %d chunks, one with 1 got %d", g, m)
		}
		before := *got["greedy"] + *got["modest"]
		want("reader", blockdev.Demand, 2)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := *got["greedy"] + *got["modest"] - before; n > 20 || *got["reader"] < 950 {
			t.Errorf("beside %d chunks of demand, %d of prefetch were sent", *got["reader"], n)
		}
		cancel()
		synctest.Wait()
		for _, c := range p.classes {
			if c.bytes != 0 || len(c.turns) != 0 || len(c.keys) != 0 {
				t.Errorf("left over: %+v", c)
			}
		}
	})
}

// What somebody would wait for is what goes before, and not what others have in line
// behind it.
func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(10 * chunkSize)
		ctx, cancel := context.WithCancel(t.Context())
		for range 60 {
			go func() { _ = p.Take(ctx, "greedy", blockdev.Prefetch, chunkSize) }()
		}
		synctest.Wait()
		if w := p.Wait("greedy", blockdev.Prefetch); w < 2*time.Second {
			t.Errorf("one with 60 chunks in line is to wait for %v", w)
		}
		if w := p.Wait("modest", blockdev.Prefetch); w > 300*time.Millisecond {
			t.Errorf("another one is to wait for %v", w)
		}
		if w := p.Wait("greedy", blockdev.Demand); w > 200*time.Millisecond {
			t.Errorf("demand waits for prefetch: %v", w)
		}
		if got := p.Waiting()[blockdev.Prefetch]; got < 20*chunkSize || got > 60*chunkSize {
			t.Errorf("%d bytes wait", got)
		}
		cancel()
		synctest.Wait()
		if w := p.Wait("greedy", blockdev.Prefetch); w > 200*time.Millisecond || p.Waiting() != [3]int64{} {
			t.Errorf("nobody waits any more: %v, %v", w, p.Waiting())
		}
	})
}
