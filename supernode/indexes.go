package supernode

import (
	"context"
	"fmt"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/flight"
	"github.com/shoalfs/shoal/internal/lru"
)

// maxIndexes bounds the encoded indexes that are kept in memory, in bytes.
const maxIndexes = 64 << 20

// indexes keeps the encoded indexes that were asked for last: in a rollout a
// thousand nodes ask for the same ones at the same time, and would have a copy each.
// One is read once for all of them, and not any more when all have left.
type indexes struct {
	touch   func(diff blockdev.Digest) bool // whether it is still stored
	read    func(ctx context.Context, diff blockdev.Digest) ([]byte, error)
	reading *flight.Group[blockdev.Digest, *encoded]
	limit   int

	mu    sync.Mutex
	lru   *lru.Map[blockdev.Digest, *encoded]
	bytes int
}

// encoded is an index as it is sent.
type encoded struct {
	diff blockdev.Digest
	data []byte // nobody changes it
	sum  blockdev.Digest
}

func newIndexes(read func(context.Context, blockdev.Digest) ([]byte, error), touch func(blockdev.Digest) bool) *indexes {
	x := &indexes{read: read, touch: touch, reading: flight.New[blockdev.Digest, *encoded](flight.Policy{}, errStopping), limit: maxIndexes}
	x.lru = lru.Unbounded(func(_ blockdev.Digest, e *encoded) { x.bytes -= len(e.data) }) // but by bytes
	return x
}

func (x *indexes) close() error {
	x.reading.Close()
	return nil
}

// get returns the index of a diff. Its errors are those of the store.
func (x *indexes) get(ctx context.Context, diff blockdev.Digest) (*encoded, error) {
	if e := x.find(diff); e != nil {
		if x.touch(diff) {
			return e, nil
		}
		x.forget(e) // evicted: read again, or not to be found
	}
	a, err := x.reading.Join(diff, func() (*encoded, flight.Work) {
		e := &encoded{diff: diff}
		return e, func(ctx context.Context) (err error) {
			if e.data, err = x.read(ctx, diff); err == nil {
				e.sum = blockdev.Sum(e.data)
				x.keep(e)
			}
			return err
		}
	})
	if err != nil {
		return nil, err
	}
	if err := a.Wait(ctx); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("index of diff %s: %w", diff, ctx.Err())
		}
		return nil, err
	}
	return a.State, nil
}

// find returns what is kept of a diff; nil: nothing.
func (x *indexes) find(diff blockdev.Digest) *encoded {
	x.mu.Lock()
	defer x.mu.Unlock()
	e, _ := x.lru.Get(diff)
	return e
}

// keep keeps an index, in the place of those that were not asked for for longest.
func (x *indexes) keep(e *encoded) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.lru.Remove(e.diff)
	x.lru.Add(e.diff, e)
	x.bytes += len(e.data)
	for x.bytes > x.limit {
		x.lru.RemoveOldest()
	}
}

func (x *indexes) forget(e *encoded) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if now, _ := x.lru.Peek(e.diff); now == e {
		x.lru.Remove(e.diff)
	}
}
