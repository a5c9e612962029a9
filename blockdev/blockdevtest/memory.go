package blockdevtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
)

// SourceFunc is a blockdev.Source made of a function.
type SourceFunc func(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error

// Fetch calls f.
func (f SourceFunc) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	return f(ctx, req, deliver)
}

// Memory is a blockdev.Source that holds its chunks in memory. The zero value
// is empty and ready. It may be used from several goroutines at once.
type Memory struct {
	mu       sync.RWMutex
	chunks   map[blockdev.Digest][]byte
	record   bool
	requests []blockdev.Request
}

// Put adds a chunk or header piece and returns its digest. data is kept, not
// copied.
func (m *Memory) Put(data []byte) blockdev.Digest {
	d := blockdev.Sum(data)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.chunks == nil {
		m.chunks = make(map[blockdev.Digest][]byte)
	}
	m.chunks[d] = data
	return d
}

// PutDiff adds every chunk of a diff, data being the masked diff. data is kept.
func (m *Memory) PutDiff(ix *blockdev.Index, data []byte) {
	for _, c := range ix.Chunks {
		m.Put(data[c.Offset:][:c.Length:c.Length])
	}
}

// Delete takes a chunk out again.
func (m *Memory) Delete(d blockdev.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.chunks, d)
}

// Record keeps a copy of every request from now on; Requests returns them.
func (m *Memory) Record() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.record = true
}

// Requests returns the requests since Record, in the order of their arrival.
func (m *Memory) Requests() []blockdev.Request {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.Clone(m.requests)
}

// Fetch implements blockdev.Source. Chunks that it has are delivered even if it
// lacks others.
func (m *Memory) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	m.mu.Lock()
	if m.record {
		r := req
		r.Chunks = slices.Clone(req.Chunks)
		m.requests = append(m.requests, r)
	}
	m.mu.Unlock()

	var missing error
	for i, c := range req.Chunks {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("fetch from memory: %w", context.Cause(ctx))
		}
		m.mu.RLock()
		data, ok := m.chunks[c.Digest]
		m.mu.RUnlock()
		if !ok {
			missing = errors.Join(missing, fmt.Errorf("chunk %v of diff %v: %w", c.Digest, req.Diff, blockdev.ErrNotFound))
			continue
		}
		if err := deliver(i, data); err != nil {
			return fmt.Errorf("deliver chunk %v: %w", c.Digest, err)
		}
	}
	return missing
}
