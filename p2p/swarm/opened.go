package swarm

import (
	"context"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

const (
	// keepOpened is for how long indexes are kept in memory for other nodes. After
	// that they come from the store, which has them by then.
	keepOpened = 10 * time.Second
	// maxOpened bounds them, in bytes.
	maxOpened = 32 << 20
)

// opened keeps the indexes of images that are being opened, or were a moment ago, for
// nodes that the supernode sends here for them: these may come before they do.
type opened struct {
	mu    sync.Mutex
	m     map[blockdev.Digest]*opening // by DiffID
	bytes int
}

// opening is one index.
type opening struct {
	done  chan struct{} // closed when index is set
	index []byte        // nil: it did not come, or there was no room
}

// openings are those that one call of FetchIndexes brings.
type openings map[blockdev.Digest]*opening

// begin notes that the image's indexes are on their way.
func (o *opened) begin(img *image.Image) openings {
	own := openings{}
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range img.Layers {
		l := &img.Layers[i]
		if l.Index == nil && l.IndexSize == 0 || o.m[l.DiffID] != nil {
			continue // it is here, or somebody else brings it
		}
		e := &opening{done: make(chan struct{})}
		o.m[l.DiffID], own[l.DiffID] = e, e
	}
	return own
}

// set gives an index of begin's to those that wait for it.
func (o *opened) set(own openings, diff blockdev.Digest, index []byte) {
	e := own[diff]
	if e == nil || index == nil {
		return
	}
	delete(own, diff)
	o.mu.Lock()
	defer o.mu.Unlock()
	defer close(e.done)
	if o.bytes+len(index) > maxOpened {
		delete(o.m, diff)
		return
	}
	e.index = index
	o.bytes += len(index)
	time.AfterFunc(keepOpened, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.m, diff)
		o.bytes -= len(index)
	})
}

// end tells those that wait for what has not come.
func (o *opened) end(own openings) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for diff, e := range own {
		delete(o.m, diff)
		close(e.done)
	}
}

// get returns an index, waiting for one that is on its way; nil: there is none.
func (o *opened) get(ctx context.Context, diff blockdev.Digest) ([]byte, error) {
	o.mu.Lock()
	e := o.m[diff]
	o.mu.Unlock()
	if e == nil {
		return nil, nil
	}
	select {
	case <-e.done:
		return e.index, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
