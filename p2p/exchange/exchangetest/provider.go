package exchangetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/p2p/exchange"
)

// NewProvider returns a Provider that has the chunks of one diff, ix, whose masked diff is
// data, and a Query of a peer that may have them: without Priority and Digests, which the
// suite sets. What has to be cleaned up it registers with t.Cleanup.
type NewProvider func(t *testing.T, ix *blockdev.Index, data []byte) (exchange.Provider, exchange.Query)

// TestProvider checks that a Provider keeps the contract of exchange.Provider.
func TestProvider(t *testing.T, open NewProvider) {
	t.Run("Gives", func(t *testing.T) { testGives(t, open) })
	t.Run("AnyOrder", func(t *testing.T) { testAnyOrder(t, open) })
	t.Run("None", func(t *testing.T) { testNone(t, open) })
	t.Run("SameChunkTwice", func(t *testing.T) { testSameChunkTwice(t, open) })
	t.Run("NotFound", func(t *testing.T) { testNotFound(t, open) })
	t.Run("Lent", func(t *testing.T) { testLent(t, open) })
	t.Run("Cancelled", func(t *testing.T) { testCancelled(t, open) })
	t.Run("ClosedUnread", func(t *testing.T) { testClosedUnread(t, open) })
	t.Run("Concurrent", func(t *testing.T) { testConcurrent(t, open) })
}

// fixture is a Provider and what it has.
type fixture struct {
	p     exchange.Provider
	q     exchange.Query
	ix    *blockdev.Index
	data  []byte
	plain *zstd.Decoder
}

func newFixture(t *testing.T, open NewProvider, seed uint64, size int) *fixture {
	t.Helper()
	ix, data := blockdevtest.Diff(seed, size)
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(z.Close)
	f := &fixture{ix: ix, data: data, plain: z}
	f.p, f.q = open(t, ix, data)
	return f
}

// query asks for these chunks of the diff.
func (f *fixture) query(prio blockdev.Priority, chunks ...int) *exchange.Query {
	q := f.q
	q.Priority = prio
	for _, c := range chunks {
		q.Digests = append(q.Digests, f.ix.Chunks[c].Digest)
	}
	return &q
}

// all are the numbers of all chunks.
func (f *fixture) all() []int {
	nums := make([]int, len(f.ix.Chunks))
	for i := range nums {
		nums[i] = i
	}
	return nums
}

// check compares what came for a chunk of the diff with what the diff has. It takes back
// nothing: that is the caller's.
func (f *fixture) check(e *exchange.Encoded, chunk int) error {
	want := f.data[f.ix.Chunks[chunk].Offset:][:f.ix.Chunks[chunk].Length]
	if int(e.Length) != len(want) {
		return fmt.Errorf("chunk %d has a Length of %d, want %d", chunk, e.Length, len(want))
	}
	got := e.Data
	if len(got) == 0 || len(got) > blockdev.MaxChunk {
		return fmt.Errorf("chunk %d comes in %d bytes", chunk, len(got))
	}
	if e.Zstd {
		var err error
		if got, err = f.plain.DecodeAll(got, nil); err != nil {
			return fmt.Errorf("chunk %d: %w", chunk, err)
		}
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("chunk %d has wrong bytes", chunk)
	}
	return nil
}

// take waits for the i-th chunk of an answer, which is this chunk of the diff, and gives
// it back.
func (f *fixture) take(ctx context.Context, a exchange.Answer, i, chunk int) error {
	a.Wait(ctx, i)
	e, err := a.Chunk(ctx, i)
	if err != nil {
		return fmt.Errorf("chunk %d: %w", chunk, err)
	}
	defer release(&e)
	return f.check(&e, chunk)
}

func release(e *exchange.Encoded) {
	if e.Release != nil {
		e.Release()
	}
}

// provide asks for chunks and takes them all, in the order of the query.
func (f *fixture) provide(ctx context.Context, prio blockdev.Priority, chunks ...int) error {
	a, err := f.p.Provide(ctx, f.query(prio, chunks...))
	if err != nil {
		return err
	}
	defer a.Close()
	for i, c := range chunks {
		if err := f.take(ctx, a, i, c); err != nil {
			return err
		}
	}
	return nil
}

func testGives(t *testing.T, open NewProvider) {
	f := newFixture(t, open, 1, 2<<20)
	for _, prio := range []blockdev.Priority{blockdev.Demand, blockdev.Startup, blockdev.Prefetch} {
		for _, chunks := range [][]int{{0}, f.all(), f.all()[3:6]} {
			q := f.query(prio, chunks...)
			digests := slices.Clone(q.Digests)
			a, err := f.p.Provide(t.Context(), q)
			if err != nil {
				t.Fatalf("%d chunks, priority %v: %v", len(chunks), prio, err)
			}
			for i, c := range chunks {
				if err := f.take(t.Context(), a, i, c); err != nil {
					t.Errorf("priority %v: %v", prio, err)
				}
			}
			a.Close()
			if !slices.Equal(q.Digests, digests) {
				t.Error("the query has been changed")
			}
		}
	}
}

// Each chunk is waited for by itself, and several at the same time: the last one first.
func testAnyOrder(t *testing.T, open NewProvider) {
	f := newFixture(t, open, 2, 2<<20)
	chunks := f.all()
	a, err := f.p.Provide(t.Context(), f.query(blockdev.Demand, chunks...))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for i := len(chunks) - 1; i > len(chunks)/2; i-- {
		if err := f.take(t.Context(), a, i, chunks[i]); err != nil {
			t.Error(err)
		}
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for i := range len(chunks)/2 + 1 {
		wg.Go(func() {
			if err := f.take(t.Context(), a, i, chunks[i]); err != nil {
				t.Error(err)
			}
		})
	}
}

func testNone(t *testing.T, open NewProvider) {
	f := newFixture(t, open, 3, 1<<20)
	if err := f.provide(t.Context(), blockdev.Demand); err != nil {
		t.Errorf("query for no chunks: %v", err)
	}
}

func testSameChunkTwice(t *testing.T, open NewProvider) {
	f := newFixture(t, open, 4, 1<<20)
	if err := f.provide(t.Context(), blockdev.Demand, 1, 0, 1, 1); err != nil {
		t.Error(err)
	}
}

// What is not there fails by itself, or with the whole query, and nothing else is the
// worse for it.
func testNotFound(t *testing.T, open NewProvider) {
	f := newFixture(t, open, 5, 1<<20)
	q := f.query(blockdev.Demand, 0, 1)
	q.Digests = slices.Insert(q.Digests, 1, blockdev.Sum([]byte("no diff has this")))
	a, err := f.p.Provide(t.Context(), q)
	if err != nil {
		if !errors.Is(err, blockdev.ErrNotFound) {
			t.Errorf("query with an unknown chunk: %v, want ErrNotFound", err)
		}
	} else {
		a.Wait(t.Context(), 1)
		e, err := a.Chunk(t.Context(), 1)
		if !errors.Is(err, blockdev.ErrNotFound) {
			t.Errorf("an unknown chunk: %v, want ErrNotFound", err)
		}
		if err == nil {
			release(&e)
		}
		for i, c := range map[int]int{0: 0, 2: 1} {
			if err := f.take(t.Context(), a, i, c); err != nil {
				t.Errorf("beside an unknown chunk: %v", err)
			}
		}
		a.Close()
	}
	if err := f.provide(t.Context(), blockdev.Demand, f.all()...); err != nil {
		t.Errorf("after an unknown chunk: %v", err)
	}
}

// What a chunk lends is the caller's until Release, whatever else is asked for.
func testLent(t *testing.T, open NewProvider) {
	f := newFixture(t, open, 6, 1<<20)
	chunks := f.all()
	a, err := f.p.Provide(t.Context(), f.query(blockdev.Demand, chunks...))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	lent := make([]exchange.Encoded, len(chunks))
	for i := range chunks {
		if lent[i], err = a.Chunk(t.Context(), i); err != nil {
			t.Fatalf("chunk %d: %v", i, err)
		}
	}
	if err := f.provide(t.Context(), blockdev.Demand, chunks...); err != nil {
		t.Error(err)
	}
	for i := range lent {
		if err := f.check(&lent[i], chunks[i]); err != nil {
			t.Errorf("after others were read: %v", err)
		}
		release(&lent[i])
	}
}

// A caller that has left waits for nothing, and others get what they have asked for.
func testCancelled(t *testing.T, open NewProvider) {
	f := newFixture(t, open, 7, 1<<20)
	ctx, cancel := context.WithCancel(t.Context())
	a, err := f.p.Provide(ctx, f.query(blockdev.Demand, f.all()...))
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	for i := range f.ix.Chunks {
		a.Wait(ctx, i)
		if e, err := a.Chunk(ctx, i); err == nil {
			if err := f.check(&e, i); err != nil {
				t.Error(err)
			}
			release(&e)
		} else if !errors.Is(err, context.Canceled) {
			t.Errorf("chunk %d with a cancelled context: %v", i, err)
		}
	}
	a.Close()
	if err := f.provide(t.Context(), blockdev.Demand, f.all()...); err != nil {
		t.Errorf("after a cancelled query: %v", err)
	}
}

// Nobody has to take what was asked for.
func testClosedUnread(t *testing.T, open NewProvider) {
	f := newFixture(t, open, 8, 1<<20)
	for _, prio := range []blockdev.Priority{blockdev.Prefetch, blockdev.Demand} {
		a, err := f.p.Provide(t.Context(), f.query(prio, f.all()...))
		if err != nil {
			t.Fatal(err)
		}
		a.Close()
	}
	if err := f.provide(t.Context(), blockdev.Demand, f.all()...); err != nil {
		t.Error(err)
	}
}

func testConcurrent(t *testing.T, open NewProvider) {
	f := newFixture(t, open, 9, 2<<20)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			prio := blockdev.Demand
			if g%2 == 0 {
				prio = blockdev.Startup
			}
			for k := range 4 {
				from := (g*7 + k*5) % (len(f.ix.Chunks) - 4)
				if err := f.provide(t.Context(), prio, from, from+1, from+2, from+3); err != nil {
					t.Errorf("peer %d: %v", g, err)
				}
			}
		})
	}
	wg.Wait()
}
