package supernode

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
)

// maxIndexes bounds the encoded indexes that are kept in memory, in bytes.
const maxIndexes = 64 << 20

// indexes keeps the encoded indexes that were asked for last: in a rollout a
// thousand nodes ask for the same ones at the same time, and would have a copy each.
type indexes struct {
	read  func(ctx context.Context, diff blockdev.Digest) ([]byte, error)
	touch func(diff blockdev.Digest) bool // whether it is still stored
	limit int

	mu    sync.Mutex
	m     map[blockdev.Digest]*list.Element
	lru   *list.List // of *encoded, those used last in front
	bytes int
}

// encoded is an index as it is sent.
type encoded struct {
	diff blockdev.Digest
	done chan struct{} // closed when what follows is set
	data []byte        // nobody changes it
	sum  blockdev.Digest
	err  error

	size int // counted in indexes.bytes; indexes.mu guards it
}

func newIndexes(read func(context.Context, blockdev.Digest) ([]byte, error), touch func(blockdev.Digest) bool) *indexes {
	return &indexes{read: read, touch: touch, limit: maxIndexes, m: map[blockdev.Digest]*list.Element{}, lru: list.New()}
}

// get returns the index of a diff. Its errors are those of the store.
func (x *indexes) get(ctx context.Context, diff blockdev.Digest) (*encoded, error) {
	for {
		e, mine := x.find(diff)
		if mine {
			x.fill(ctx, e)
			return e, e.err
		}
		select {
		case <-e.done:
		case <-ctx.Done():
			return nil, fmt.Errorf("index of diff %s: %w", diff, ctx.Err())
		}
		switch {
		case e.err == nil && x.touch(diff):
			return e, nil
		case e.err == nil: // evicted: read again, or not to be found
			x.forget(e)
		case !errors.Is(e.err, context.Canceled) && !errors.Is(e.err, context.DeadlineExceeded):
			return nil, e.err
			// Else whoever read it has left.
		}
	}
}

// find returns the entry of a diff, and whether the caller is to fill it.
func (x *indexes) find(diff blockdev.Digest) (e *encoded, mine bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if el := x.m[diff]; el != nil {
		x.lru.MoveToFront(el)
		return el.Value.(*encoded), false
	}
	e = &encoded{diff: diff, done: make(chan struct{})}
	x.m[diff] = x.lru.PushFront(e)
	return e, true
}

func (x *indexes) fill(ctx context.Context, e *encoded) {
	defer close(e.done)
	if e.data, e.err = x.read(ctx, e.diff); e.err != nil {
		x.forget(e)
		return
	}
	e.sum = blockdev.Sum(e.data)
	x.mu.Lock()
	defer x.mu.Unlock()
	if el := x.m[e.diff]; el == nil || el.Value != e {
		return
	}
	e.size = len(e.data)
	x.bytes += e.size
	for x.bytes > x.limit {
		old := x.lru.Back().Value.(*encoded)
		x.forgetLocked(old)
		if old == e {
			return
		}
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
	x.bytes -= e.size
}
