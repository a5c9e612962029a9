package exchange

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/p2p/wire"
)

// uploadRig is a server with an upload limit, as a supernode has it, and what nodes get
// of it over TCP.
type uploadRig struct {
	*testing.T
	store  *store
	chunks []blockdev.Chunk
	ctx    context.Context
	stop   context.CancelFunc
	wg     sync.WaitGroup
	open   func() *Client
}

// uploadRate is far below what a slow machine sends, so that the limit is what counts.
const uploadRate = 1 << 20

func newUploadRig(t *testing.T, l Limits) *uploadRig {
	data := make([][]byte, 64)
	for i := range data {
		data[i] = blockdevtest.Bytes(uint64(i), blockdev.AvgChunk)
	}
	st, chunks := newStore(t, false, data...)
	h := newHost(t, nil, loopback)
	newServer(t, h, ServerConfig{Chunks: st, Upload: pace.New(uploadRate), Limits: l})
	r := &uploadRig{T: t, store: st, chunks: chunks, open: func() *Client { return newClient(t, h, Options{}) }}
	r.ctx, r.stop = context.WithCancel(t.Context())
	t.Cleanup(func() { r.stop(); r.wg.Wait() })
	return r
}

// want has a node of its own ask for all chunks, again and again, on so many streams.
func (r *uploadRig) want(pr blockdev.Priority, streams int) *atomic.Int64 {
	c, got := r.open(), new(atomic.Int64)
	for range streams {
		r.wg.Go(func() {
			for r.ctx.Err() == nil {
				err := c.Fetch(r.ctx, request(pr, r.chunks), func(_ int, b []byte) error {
					got.Add(int64(len(b)))
					return nil
				})
				if err != nil && r.ctx.Err() == nil {
					r.Errorf("%v: %v", pr, err)
					return
				}
			}
		})
	}
	return got
}

var waits = Limits{DemandBacklog: time.Minute, PrefetchBacklog: time.Minute}

// Nodes share the upload limit: one with many streams does not get more than one with
// one, nobody is refused, and all of them together get no more than there is.
func TestUploadIsShared(t *testing.T) {
	r := newUploadRig(t, waits)
	begin := time.Now()
	greedy, modest := r.want(blockdev.Demand, 16), r.want(blockdev.Demand, 1)
	waitFor(t, "the modest node's first chunk", func() bool { return modest.Load() > 0 })
	g0, m0 := greedy.Load(), modest.Load() // what may go at once after a pause is gone
	waitFor(t, "512 KiB more for it", func() bool { return modest.Load()-m0 >= 512<<10 })
	g, m := greedy.Load(), modest.Load()
	most := uploadRate*time.Since(begin).Seconds() + 2*blockdev.MaxChunk
	if g-g0 > 2*(m-m0) {
		t.Errorf("a node with 16 streams got %d bytes while one with 1 got %d", g-g0, m-m0)
	}
	if float64(g+m) > most {
		t.Errorf("%d bytes were sent, where the limit allows %.0f", g+m, most)
	}
}

// What a container waits for does not stand in line behind prefetch of other nodes.
func TestUploadDemandFirst(t *testing.T) {
	r := newUploadRig(t, waits)
	prefetch := r.want(blockdev.Prefetch, 8)
	waitFor(t, "prefetch to be under way", func() bool { return prefetch.Load() >= 256<<10 })
	before, demand := prefetch.Load(), r.want(blockdev.Demand, 8)
	waitFor(t, "1 MiB of demand", func() bool { return demand.Load() >= 1<<20 })
	if p, d := prefetch.Load()-before, demand.Load(); p > d/2 {
		t.Errorf("beside %d bytes of demand, %d of prefetch were sent", d, p)
	}
}

// A node refuses what would wait for long, since its peers have others to ask; but who
// has nothing in line is not refused for what somebody else has.
func TestUploadBacklog(t *testing.T) {
	r := newUploadRig(t, Limits{DemandBacklog: 200 * time.Millisecond})
	// All of these are let in while nothing is in line. Each has a chunk in line from then on,
	// but for the moment in which it is sent: ten times what may be in line, however slow the
	// machine is. Requests that are let in one after the other make a line that is just as
	// long as it may be, and shorter where it takes a while to send a chunk.
	const streams = 32
	begun, all := make(chan struct{}, streams), make(chan struct{})
	r.store.hook = func(ctx context.Context, d blockdev.Digest) error {
		if d == r.chunks[0].Digest {
			select {
			case begun <- struct{}{}:
			default: // another one's, later
			}
		}
		select {
		case <-all:
		case <-ctx.Done():
		}
		return nil
	}
	c := r.open()
	for range streams {
		r.wg.Go(func() {
			if err := c.Fetch(r.ctx, request(blockdev.Demand, r.chunks), discard); err != nil && r.ctx.Err() == nil {
				t.Error(err)
			}
		})
	}
	waitFor(t, "all requests to be let in", func() bool { return len(begun) == streams })
	close(all)
	waitFor(t, "a node with a long line to be refused", func() bool {
		return errors.Is(c.Fetch(t.Context(), request(blockdev.Demand, r.chunks[:1]), discard), wire.ErrBusy)
	})
	if err := r.open().Fetch(t.Context(), request(blockdev.Demand, r.chunks[:1]), discard); err != nil {
		t.Errorf("a node with nothing in line: %v", err)
	}
}
