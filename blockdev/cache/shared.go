package cache

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache/internal/prefetch"
	"github.com/shoalfs/shoal/blockdev/cache/internal/room"
	"github.com/shoalfs/shoal/blockdev/cache/internal/table"
	"github.com/shoalfs/shoal/blockdev/index"
	"github.com/shoalfs/shoal/blockdev/turns"
)

// shared is what all diffs of a Cache have in common.
type shared struct {
	cfg  Config
	boot [16]byte
	// unclean: the machine went down while a cache was open here, and not all that
	// this made doubtful had been looked at when this cache was opened.
	unclean bool
	noted   atomic.Bool // that the cache is open
	noting  sync.Mutex  // held across I/O: one does it

	quarantine *quarantine

	pace     *prefetch.Pace
	demand   *turns.Turns        // bytes of demand requests in flight, by diff
	held     *turns.Turns        // bytes that reads hold, unwritten, by diff
	decoding *semaphore.Weighted // bytes of indexes
	kicked   chan struct{}       // the syncer has work
	buffers  bufferPool
	stats    counters
	room     *room.Room
	recent   recent

	// life ends with Close.
	life context.Context
	end  context.CancelFunc

	// list is what all diffs have on disk, for lookups that must not lock.
	list atomic.Pointer[[]*local]
}

// lookup finds a diff that has a chunk with this digest, and its number there.
func (c *shared) lookup(digest *blockdev.Digest) (*local, int) {
	for _, o := range *c.list.Load() {
		for _, k := range o.tab.Find(digest) {
			if o.pres.Has(int(k)) {
				return o, int(k)
			}
		}
	}
	return nil, 0
}

// decode reads an encoded index when there is memory for it, which done gives back.
func (c *shared) decode(ctx context.Context, enc []byte) (_ *blockdev.Index, done func(), err error) {
	info, err := index.Peek(enc)
	if err != nil {
		return nil, nil, err
	}
	n := min(info.Memory+int64(info.Chunks)*table.Memory, c.cfg.IndexBytes)
	if err := c.decoding.Acquire(ctx, n); err != nil {
		return nil, nil, context.Cause(ctx)
	}
	ix, err := c.cfg.decode(enc)
	if err != nil {
		c.decoding.Release(n)
		return nil, nil, err
	}
	return ix, func() { c.decoding.Release(n) }, nil
}

// syncer syncs diffs in the background, one at a time: those with much unsynced
// when kicked, all of them at every interval.
func (c *shared) syncer() {
	t := time.NewTicker(c.cfg.SyncInterval)
	defer t.Stop()
	for {
		least := c.cfg.SyncBytes
		select {
		case <-c.life.Done():
			return
		case <-t.C:
			least = 1
		case <-c.kicked:
		}
		for _, d := range *c.list.Load() {
			if _, _, unsynced := d.pres.Counts(); unsynced >= least && c.life.Err() == nil {
				// sync has logged its error, and the next interval tries again.
				_ = d.sync(c.life)
			}
		}
	}
}

func (c *shared) kick() {
	select {
	case c.kicked <- struct{}{}:
	default:
	}
}

// chunkBuffer has room for any chunk.
type chunkBuffer = *[blockdev.MaxChunk]byte

// bufferPool keeps buffers for chunks that are read back from this disk.
type bufferPool struct{ pool sync.Pool }

// Put gives a buffer back.
func (p *bufferPool) Put(b chunkBuffer) { p.pool.Put(b) }

func (c *shared) buffer() chunkBuffer {
	if b, ok := c.buffers.pool.Get().(chunkBuffer); ok {
		return b
	}
	return new([blockdev.MaxChunk]byte)
}
