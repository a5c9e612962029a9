package blockdevtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// NewSource returns a Source that has exactly these chunks, data[i] being the
// bytes of one. What it needs to clean up, it registers with t.Cleanup.
type NewSource func(t *testing.T, data [][]byte) blockdev.Source

// NewDiff returns a Source that has one diff, of size bytes or somewhat more and of
// content that is a function of seed, and the diff's DiffID and chunks. What it needs to
// clean up, it registers with t.Cleanup.
type NewDiff func(t *testing.T, seed uint64, size int) (src blockdev.Source, diff blockdev.Digest, chunks []blockdev.Chunk)

// TestSource checks that a Source keeps the contract of blockdev.Source.
func TestSource(t *testing.T, open NewSource) {
	TestDiffSource(t, func(t *testing.T, seed uint64, size int) (blockdev.Source, blockdev.Digest, []blockdev.Chunk) {
		ix, data := Diff(seed, size)
		return open(t, split(data, ix.Chunks)), ix.DiffID, ix.Chunks
	})
	t.Run("Sizes", func(t *testing.T) { testSizes(t, open) })
}

// TestDiffSource is TestSource for a Source that cannot be given chunks of any bytes and
// size, since it makes them itself of a layer.
func TestDiffSource(t *testing.T, open NewDiff) {
	t.Run("Delivers", func(t *testing.T) { testDelivers(t, open) })
	t.Run("Empty", func(t *testing.T) { testEmpty(t, open) })
	t.Run("SameChunkTwice", func(t *testing.T) { testSameChunkTwice(t, open) })
	t.Run("NotFound", func(t *testing.T) { testNotFound(t, open) })
	t.Run("DeliverFails", func(t *testing.T) { testDeliverFails(t, open) })
	t.Run("DeliverFindsCorrupt", func(t *testing.T) { testDeliverFindsCorrupt(t, open) })
	t.Run("CancelledBefore", func(t *testing.T) { testCancelledBefore(t, open) })
	t.Run("CancelledWithin", func(t *testing.T) { testCancelledWithin(t, open) })
	t.Run("KeepsNothing", func(t *testing.T) { testKeepsNothing(t, open) })
	t.Run("Concurrent", func(t *testing.T) { testConcurrent(t, open) })
}

// collector is a Deliver that checks what every Source owes its callers: right
// bytes, a valid number, once each, one call at a time, none after Fetch.
type collector struct {
	t        *testing.T
	diff     blockdev.Digest
	chunks   []blockdev.Chunk
	got      []int // deliveries of chunk i
	inside   atomic.Bool
	returned atomic.Bool
}

func newCollector(t *testing.T, diff blockdev.Digest, chunks []blockdev.Chunk) *collector {
	return &collector{t: t, diff: diff, chunks: chunks, got: make([]int, len(chunks))}
}

func (c *collector) deliver(i int, data []byte) error {
	if c.returned.Load() {
		c.t.Errorf("deliver was called after Fetch had returned")
	}
	if !c.inside.CompareAndSwap(false, true) {
		c.t.Errorf("deliver was called while another call of it was under way")
	}
	defer c.inside.Store(false)
	if i < 0 || i >= len(c.chunks) {
		c.t.Errorf("delivered chunk number %d of %d", i, len(c.chunks))
		return errors.New("no such chunk in the request")
	}
	if err := c.chunks[i].Check(data); err != nil {
		c.t.Errorf("chunk %d: %v", i, err)
	}
	if c.got[i]++; c.got[i] > 1 {
		c.t.Errorf("chunk %d was delivered %d times", i, c.got[i])
	}
	return nil
}

func (c *collector) delivered() (n int) {
	for _, k := range c.got {
		n += min(k, 1)
	}
	return n
}

// fetch runs one request through the collector.
func (c *collector) fetch(ctx context.Context, src blockdev.Source, prio blockdev.Priority) error {
	defer c.returned.Store(true)
	return src.Fetch(ctx, blockdev.Request{Diff: c.diff, Priority: prio, Chunks: c.chunks}, c.deliver)
}

var testDiffID = blockdev.Sum([]byte("blockdevtest"))

func split(data []byte, chunks []blockdev.Chunk) [][]byte {
	out := make([][]byte, len(chunks))
	for i, c := range chunks {
		out[i] = data[c.Offset:][:c.Length:c.Length]
	}
	return out
}

func testDelivers(t *testing.T, open NewDiff) {
	src, diff, chunks := open(t, 1, 4<<20)
	for _, prio := range []blockdev.Priority{blockdev.Demand, blockdev.Prefetch} {
		for _, part := range [][]blockdev.Chunk{chunks, chunks[:1], chunks[3:9]} {
			c := newCollector(t, diff, part)
			if err := c.fetch(t.Context(), src, prio); err != nil {
				t.Fatalf("fetch of %d chunks: %v", len(part), err)
			}
			if n := c.delivered(); n != len(part) {
				t.Fatalf("nil error, but %d of %d chunks delivered", n, len(part))
			}
		}
	}
}

// testSizes asks for the shortest and the longest chunks there may be, of
// content that compresses well and of content that does not.
func testSizes(t *testing.T, open NewSource) {
	var all [][]byte
	for i, n := range []int{1, 2, 511, 512, 513, blockdev.MinChunk, blockdev.AvgChunk, blockdev.MaxChunk - 1, blockdev.MaxChunk} {
		all = append(all, Bytes(uint64(100+i), n), bytes.Repeat([]byte{byte(i)}, n))
	}
	chunks := make([]blockdev.Chunk, len(all))
	var off int64
	for i, data := range all {
		chunks[i] = blockdev.Chunk{Offset: off, Length: uint32(len(data)), Digest: blockdev.Sum(data)}
		off += int64(len(data))
	}
	src := open(t, all)
	c := newCollector(t, testDiffID, chunks)
	if err := c.fetch(t.Context(), src, blockdev.Demand); err != nil {
		t.Fatal(err)
	}
	if n := c.delivered(); n != len(chunks) {
		t.Fatalf("nil error, but %d of %d chunks delivered", n, len(chunks))
	}
}

func testEmpty(t *testing.T, open NewDiff) {
	src, diff, _ := open(t, 2, 1<<20)
	c := newCollector(t, diff, nil)
	if err := c.fetch(t.Context(), src, blockdev.Demand); err != nil {
		t.Fatalf("request for no chunks: %v", err)
	}
}

// testSameChunkTwice: a diff may hold the same bytes in several places.
func testSameChunkTwice(t *testing.T, open NewDiff) {
	src, diff, chunks := open(t, 3, 1<<20)
	again := []blockdev.Chunk{chunks[0], chunks[1], chunks[0], chunks[0]}
	c := newCollector(t, diff, again)
	if err := c.fetch(t.Context(), src, blockdev.Demand); err != nil {
		t.Fatal(err)
	}
	if n := c.delivered(); n != len(again) {
		t.Fatalf("nil error, but %d of %d places delivered", n, len(again))
	}
}

func testNotFound(t *testing.T, open NewDiff) {
	src, diff, chunks := open(t, 4, 1<<20)
	unknown := blockdev.Chunk{Length: 20000, Digest: blockdev.Sum([]byte("no source has this"))}
	for _, ask := range [][]blockdev.Chunk{{unknown}, {unknown, chunks[0]}, {chunks[0], unknown, chunks[1]}} {
		c := newCollector(t, diff, ask)
		err := c.fetch(t.Context(), src, blockdev.Demand)
		if !errors.Is(err, blockdev.ErrNotFound) {
			t.Fatalf("fetch of an unknown chunk: %v, want ErrNotFound", err)
		}
	}
	// The Source is none the worse for it.
	c := newCollector(t, diff, chunks)
	if err := c.fetch(t.Context(), src, blockdev.Demand); err != nil {
		t.Fatalf("fetch after ErrNotFound: %v", err)
	}
}

func testDeliverFails(t *testing.T, open NewDiff) {
	src, diff, chunks := open(t, 5, 8<<20)
	stop := errors.New("the disk is on fire")
	for _, after := range []int{0, 1, 5} {
		calls := 0
		err := src.Fetch(t.Context(), blockdev.Request{Diff: diff, Priority: blockdev.Demand, Chunks: chunks},
			func(int, []byte) error {
				if calls++; calls > after {
					return stop
				}
				return nil
			})
		if !errors.Is(err, stop) {
			t.Fatalf("deliver failed, Fetch returned %v, want deliver's error", err)
		}
		if calls != after+1 {
			t.Fatalf("deliver was called %d more times after it had ended the request", calls-after-1)
		}
	}
	c := newCollector(t, diff, chunks)
	if err := c.fetch(t.Context(), src, blockdev.Demand); err != nil {
		t.Fatalf("fetch after a request that deliver ended: %v", err)
	}
}

// testDeliverFindsCorrupt: the Source may deliver that chunk again from
// elsewhere, and then the request is a success, or end with ErrCorrupt.
func testDeliverFindsCorrupt(t *testing.T, open NewDiff) {
	src, diff, chunks := open(t, 6, 1<<20)
	got := make([]bool, len(chunks))
	var refused bool
	err := src.Fetch(t.Context(), blockdev.Request{Diff: diff, Priority: blockdev.Demand, Chunks: chunks},
		func(i int, data []byte) error {
			if !refused && i == 2 {
				refused = true
				return fmt.Errorf("the suite pretends that chunk %d is wrong: %w", i, blockdev.ErrCorrupt)
			}
			if err := chunks[i].Check(data); err != nil {
				t.Errorf("chunk %d: %v", i, err)
			}
			got[i] = true
			return nil
		})
	if err == nil {
		for i, ok := range got {
			if !ok {
				t.Errorf("nil error, but chunk %d was never accepted", i)
			}
		}
	} else if !errors.Is(err, blockdev.ErrCorrupt) {
		t.Fatalf("deliver found ErrCorrupt, Fetch returned %v", err)
	}
}

func testCancelledBefore(t *testing.T, open NewDiff) {
	src, diff, chunks := open(t, 7, 1<<20)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c := newCollector(t, diff, chunks)
	if err := c.fetch(ctx, src, blockdev.Demand); !errors.Is(err, context.Canceled) {
		t.Fatalf("fetch with a cancelled context: %v", err)
	}
}

// testCancelledWithin cancels from inside deliver, so that the request is
// certainly under way, and has more chunks than fit in any pipe between.
func testCancelledWithin(t *testing.T, open NewDiff) {
	src, diff, chunks := open(t, 8, 32<<20)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := newCollector(t, diff, chunks)
	var calls int
	err := func() error {
		defer c.returned.Store(true)
		return src.Fetch(ctx, blockdev.Request{Diff: diff, Priority: blockdev.Prefetch, Chunks: chunks},
			func(i int, data []byte) error {
				if calls++; calls == 2 {
					cancel()
				}
				return c.deliver(i, data)
			})
	}()
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("fetch cancelled on the way: %v, want context.Canceled (%d of %d chunks came)", err, calls, len(chunks))
	}
	c = newCollector(t, diff, chunks[:3])
	if err := c.fetch(t.Context(), src, blockdev.Demand); err != nil {
		t.Fatalf("fetch after a cancelled one: %v", err)
	}
}

// testKeepsNothing overwrites the request's slice as soon as Fetch is back; the
// race detector sees a Source that still reads it.
func testKeepsNothing(t *testing.T, open NewDiff) {
	src, diff, chunks := open(t, 9, 2<<20)
	for range 4 {
		mine := append([]blockdev.Chunk(nil), chunks...)
		if err := newCollector(t, diff, mine).fetch(t.Context(), src, blockdev.Demand); err != nil {
			t.Fatal(err)
		}
		clear(mine)
	}
}

func testConcurrent(t *testing.T, open NewDiff) {
	src, diff, chunks := open(t, 10, 4<<20)
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for k := range 4 {
				from := (g*7 + k*13) % len(chunks)
				part := chunks[from:min(from+8, len(chunks))]
				prio := blockdev.Demand
				if g%2 == 0 {
					prio = blockdev.Prefetch
				}
				c := newCollector(t, diff, part)
				if err := c.fetch(t.Context(), src, prio); err != nil {
					t.Errorf("reader %d: %v", g, err)
				} else if n := c.delivered(); n != len(part) {
					t.Errorf("reader %d: nil error, but %d of %d chunks delivered", g, n, len(part))
				}
			}
		})
	}
	wg.Wait()
}
