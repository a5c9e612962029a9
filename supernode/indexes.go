package supernode

import (
	"container/list"
	"context"
	"fmt"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/flight"
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
	m     map[blockdev.Digest]*list.Element
	lru   *list.List // of *encoded, those used last in front
	bytes int
}

// encoded is an index as it is sent.
type encoded struct {
	diff blockdev.Digest
	data []byte // nobody changes it
	sum  blockdev.Digest
}

func newIndexes(read func(context.Context, blockdev.Digest) ([]byte, error), touch func(blockdev.Digest) bool) *indexes {
	return &indexes{read: read, touch: touch, reading: flight.New[blockdev.Digest, *encoded](flight.Policy{}, errStopping),
		limit: maxIndexes, m: map[blockdev.Digest]*list.Element{}, lru: list.New()}
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
	el := x.m[diff]
	if el == nil {
		return nil
	}
	x.lru.MoveToFront(el)
	return el.Value.(*encoded)
}

// keep keeps an index, in the place of those that were not asked for for longest.
func (x *indexes) keep(e *encoded) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if el := x.m[e.diff]; el != nil {
		x.forgetLocked(el.Value.(*encoded))
	}
	x.m[e.diff] = x.lru.PushFront(e)
	x.bytes += len(e.data)
	for x.bytes > x.limit {
		x.forgetLocked(x.lru.Back().Value.(*encoded))
	}
}

func (x *indexes) forget(e *encoded) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.forgetLocked(e)
}

func (x *indexes) forgetLocked(e *encoded) {
	el := x.m[e.diff]
	if el == nil || el.Value != e {
		return
	}
	delete(x.m, e.diff)
	x.lru.Remove(el)
	x.bytes -= len(e.data)
}
