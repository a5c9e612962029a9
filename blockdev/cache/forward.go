package cache

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/shoalfs/shoal/blockdev"
)

// Forward is chunks of one diff that another node has asked this one for. What
// is missing here is fetched as this node's own chunks are: in the same flights,
// checked and stored once, for all callers.
type Forward struct {
	d    *Diff
	prio blockdev.Priority
	hops int
	nums []int // of the chunks; -1: the diff has none with that digest
	// digests are for pieces of the header stream, which have no number.
	digests []blockdev.Digest
}

// Forward finds chunks of a diff for another node. hops is how often the request
// was forwarded before it came here. A diff that is not in the cache is
// blockdev.ErrNotFound. Pieces of its header stream are given as far as they are
// here. Callers must not change digests during the call.
func (c *Cache) Forward(diff blockdev.Digest, prio blockdev.Priority, hops int, digests []blockdev.Digest) (*Forward, error) {
	d, ok := c.Get(diff)
	if !ok {
		return nil, fmt.Errorf("diff %v is not on this node: %w", diff, blockdev.ErrNotFound)
	}
	f := &Forward{d: d, prio: prio, hops: hops, nums: make([]int, len(digests)), digests: digests}
	for i := range digests {
		f.nums[i] = -1
		if nums := d.tab.Find(&digests[i]); len(nums) > 0 {
			f.nums[i] = int(nums[0])
		}
	}
	return f, nil
}

// EncodedIndex returns the index of a diff as it was added, for another node. A
// diff that is not in the cache, or is under quarantine, is blockdev.ErrNotFound;
// an index that the disk has spoiled is blockdev.ErrCorrupt.
func (c *Cache) EncodedIndex(diff blockdev.Digest) ([]byte, error) {
	d, ok := c.Get(diff)
	if !ok || d.Proof() == Quarantined {
		return nil, fmt.Errorf("diff %v is not on this node: %w", diff, blockdev.ErrNotFound)
	}
	return d.encodedIndex()
}

// Missing is how many of the chunks, all of which the diff may have, are not on
// this node's disk now.
func (f *Forward) Missing() (n int) {
	for i := range f.nums {
		if f.Absent(i) {
			n++
		}
	}
	return n
}

// Has says whether the i-th chunk is one of the diff's.
func (f *Forward) Has(i int) bool { return f.nums[i] >= 0 }

// Absent says whether the i-th chunk is one of the diff's, but not on this node's
// disk now.
func (f *Forward) Absent(i int) bool {
	return f.nums[i] >= 0 && !f.d.pres.Has(f.nums[i])
}

// Start asks for what is missing and not in flight, in requests of the usual
// size, and returns without waiting for it. Chunk does so as well, one by one.
func (f *Forward) Start() error {
	if err := f.d.flights.start(f.nums, f.prio, f.hops); err != nil {
		return fmt.Errorf("diff %v: %w", f.d.id, err)
	}
	return nil
}

// Chunk waits for the i-th chunk and returns its bytes, checked, in the buffer of
// at least n bytes that alloc returns when they are there. Its errors wrap the cause:
// blockdev.ErrNotFound if the diff has no such chunk, the Source's error,
// ErrRemoved, ErrClosed, or ctx's.
func (f *Forward) Chunk(ctx context.Context, i int, alloc func(n int) []byte) ([]byte, error) {
	d, k := f.d, f.nums[i]
	if k < 0 {
		if b, ok := d.heads.read(&d.local, &f.digests[i], alloc); ok {
			return b, nil
		}
		return nil, fmt.Errorf("diff %v has no such chunk: %w", d.id, blockdev.ErrNotFound)
	}
	n := d.tab.Length(k)
	for try := 0; ; try++ {
		if d.pres.Has(k) {
			buf := alloc(n)[:n]
			switch err := d.readChunk(k, buf); {
			case err == nil:
				return buf, nil
			case errors.Is(err, os.ErrClosed):
				return buf, d.flights.why()
			}
		}
		w, err := d.flights.joinOne(k, f.prio, f.hops)
		if err != nil {
			return nil, err
		}
		if w.flight == nil {
			continue // it has come since
		}
		err = d.flights.await(ctx, []wait{w})
		if b, _ := w.outcome(); b != nil {
			return append(alloc(n)[:0], b...), nil
		}
		if err == nil && try > 0 {
			err = w.err // await has seen its end
		}
		if err != nil {
			return nil, err
		}
	}
}

// Wait returns when Chunk need not wait for the i-th chunk any more.
func (f *Forward) Wait(ctx context.Context, i int) {
	k := f.nums[i]
	if k < 0 || f.d.pres.Has(k) {
		return
	}
	if w, err := f.d.flights.joinOne(k, f.prio, f.hops); err == nil && w.flight != nil {
		_ = f.d.flights.await(ctx, []wait{w}) // Chunk finds out what came of it
	}
}
