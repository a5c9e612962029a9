package exchange

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

const chunkSize = blockdev.AvgChunk

func TestPacerRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPacer(10 * chunkSize)
		begin := time.Now()
		for range 100 {
			if err := p.take(t.Context(), "a", blockdev.Prefetch, chunkSize); err != nil {
				t.Fatal(err)
			}
		}
		// 100 chunks at 10 a second, of which the first few go at once.
		if took := time.Since(begin); took < 9*time.Second || took > 10*time.Second {
			t.Errorf("took %v", took)
		}
	})
	var none *Pacer
	if err := none.take(t.Context(), "a", blockdev.Demand, 1<<40); err != nil || none.busy(blockdev.Demand) != nil || NewPacer(0) != nil {
		t.Error("no limit is a limit")
	}
}

// Each of several peers gets its share, however much one of them wants; and
// demand goes first.
func TestPacerShares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPacer(100 * chunkSize)
		ctx, cancel := context.WithCancel(t.Context())
		got := map[peer.ID]*int{"greedy": new(int), "modest": new(int), "reader": new(int)}
		want := func(id peer.ID, pr blockdev.Priority, several int) {
			for range several {
				go func() {
					for p.take(ctx, id, pr, chunkSize) == nil {
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
			if c.bytes != 0 || len(c.turns) != 0 || len(c.peers) != 0 {
				t.Errorf("left over: %+v", c)
			}
		}
	})
}

func TestPacerBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPacer(10 * chunkSize)
		ctx, cancel := context.WithCancel(t.Context())
		for range 30 {
			go func() { _ = p.take(ctx, "a", blockdev.Prefetch, chunkSize) }()
		}
		synctest.Wait()
		if err := p.busy(blockdev.Prefetch); !errors.Is(err, wire.ErrBusy) {
			t.Errorf("with a backlog of 2 s, prefetch is told %v", err)
		}
		if err := p.busy(blockdev.Demand); err != nil {
			t.Errorf("demand waits for prefetch: %v", err)
		}
		cancel()
		synctest.Wait()
		if err := p.busy(blockdev.Prefetch); err != nil {
			t.Errorf("nobody waits any more: %v", err)
		}
	})
}
