package exchange

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

// Via is what a request to a node says about its way.
type Via struct {
	// Group is the manifest digest of the image in whose group it travels.
	Group blockdev.Digest
	// Hops is how often it was forwarded, this time included.
	Hops int
	// Failed, if not nil, is called for each chunk that the server refuses, as the
	// answer comes; such a chunk is no failure of the request then.
	Failed func(i int, err error)
}

// Fetch implements blockdev.Source. Chunks that the server does not have do not
// keep it from delivering the others.
func (c *Client) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	return c.FetchVia(ctx, c.opts.Via, req, deliver)
}

// FetchVia is Fetch for requests from node to node.
func (c *Client) FetchVia(ctx context.Context, via Via, req blockdev.Request, deliver blockdev.Deliver) error {
	f := fetch{c: c, lane: c.pre, timeout: c.opts.PrefetchTimeout, priority: req.Priority, deliver: deliver, failed: via.Failed}
	f.msg = wire.ChunkRequest{Diff: req.Diff[:], AcceptZstd: !c.opts.Raw, Hops: uint32(via.Hops)}
	if via.Group != (blockdev.Digest{}) {
		f.msg.Group = via.Group[:]
	}
	if ctx.Err() != nil {
		return c.explain(contextError(ctx))
	}
	for _, ch := range req.Chunks {
		if ch.Length == 0 || ch.Length > blockdev.MaxChunk {
			return fmt.Errorf("chunk %s of %d bytes, not 1 to %d: %w", ch.Digest.Hex(), ch.Length, blockdev.MaxChunk, blockdev.ErrCorrupt)
		}
	}
	switch req.Priority {
	case blockdev.Demand:
		f.lane, f.timeout = c.demand, c.opts.DemandTimeout
		f.msg.Priority = wire.Priority_PRIORITY_DEMAND
		c.window.demandBegins()
		defer c.window.demandEnds()
	case blockdev.Startup:
		f.lane, f.window = c.startup, c.starting
		f.msg.Priority = wire.Priority_PRIORITY_STARTUP
	default:
		if f.window = c.window; req.Hops > 0 {
			f.lane, f.forward = c.forward, true
		}
	}
	if c.opts.Peer {
		f.window = nil
	}
	for f.base = 0; f.base < len(req.Chunks); f.base += wire.MaxDigests {
		f.chunks = req.Chunks[f.base:min(f.base+wire.MaxDigests, len(req.Chunks))]
		if err := f.batch(ctx); err != nil {
			return f.fail(err)
		}
	}
	if f.missing != nil {
		return c.explain(fmt.Errorf("%d of %d chunks not delivered, the first: %w", f.missed, len(req.Chunks), f.missing))
	}
	return nil
}

// fetch is one call of Fetch.
type fetch struct {
	c       *Client
	lane    *lane
	timeout time.Duration
	deliver blockdev.Deliver
	failed  func(i int, err error)
	msg     wire.ChunkRequest

	window   *LinkWindow // of prefetch, or of startup chunks; nil: nothing to wait for
	priority blockdev.Priority
	forward  bool // prefetch for another node

	base   int              // of chunks, in the caller's request
	chunks []blockdev.Chunk // of the batch

	// The batch on its stream:
	asked   int    // how many chunks were asked for
	parts   []part // the requests under way, the oldest first
	seen    int    // frames of the oldest that have come
	have    [wire.MaxDigests]bool
	counted int64 // bytes of chunks that count in the window

	begun   bool // a frame of the batch has come
	missed  int
	missing error // of the first chunk that the server could not give
}

// deliverError is what deliver returned: the caller's own.
type deliverError struct{ error }

func (e deliverError) Unwrap() error { return e.error }

func (f *fetch) fail(err error) error {
	var d deliverError
	if errors.As(err, &d) && !errors.Is(d.error, blockdev.ErrCorrupt) {
		return d.error
	}
	return f.c.explain(err)
}

// batch gets the chunks of one batch. A stream from the pool, or the connection,
// may have died unnoticed: if nothing came of the first attempt, there is a
// second one, on a new stream.
func (f *fetch) batch(ctx context.Context) error {
	var err error
	if f.priority != blockdev.Demand && f.c.opts.Peer {
		err = f.lane.tryEnter()
	} else {
		err = f.lane.enter(ctx)
	}
	if err != nil {
		return err
	}
	defer f.lane.leave()
	for attempt := 1; ; attempt++ {
		if err := f.c.readyForChunks(ctx, f.priority); err != nil {
			return err
		}
		f.begun = false
		st, err := f.lane.get(ctx, attempt > 1)
		if err == nil {
			err = f.exchange(ctx, st)
		}
		if err == nil {
			return nil
		}
		if d := (deliverError{}); errors.As(err, &d) {
			return err
		}
		if ctx.Err() == nil {
			f.c.keeper.report()
		}
		if attempt > 1 || f.begun || !f.c.broken(ctx, err) {
			return f.c.cause(ctx, err, f.timeout)
		}
	}
}

// exchange sends the request on st and takes the answer. It keeps st if all went
// by the rules, and resets it otherwise.
func (f *fetch) exchange(ctx context.Context, st *stream) (err error) {
	stop := context.AfterFunc(ctx, func() { _ = st.Reset() })
	keep := false
	defer func() {
		if stop() && keep {
			f.lane.put(st, time.Now())
		} else {
			f.lane.drop(st)
		}
	}()
	defer f.uncount()
	f.asked, f.parts = 0, f.parts[:0]
	f.newPart()
	for {
		if err := f.ask(ctx, st); err != nil {
			return err
		}
		end, err := f.frame(st)
		if err != nil {
			return err
		}
		if end == nil {
			continue
		}
		if end.Err != nil {
			keep = len(f.parts) == 1 // else more is on its way
			return end.Err.Err()
		}
		if n := f.parts[0].len(); f.seen < n {
			return fmt.Errorf("answer ends after %d of %d chunks: %w", f.seen, n, blockdev.ErrCorrupt)
		}
		f.parts = append(f.parts[:0], f.parts[1:]...)
		f.newPart()
		if len(f.parts) == 0 && f.asked == len(f.chunks) {
			keep = true
			return nil
		}
	}
}

// part is the chunks [from, end) of a batch, asked for in one request.
type part struct {
	from, end int
	longest   uint32 // of the chunks, in bytes
}

func (p *part) len() int { return p.end - p.from }

// newPart begins to take the answer to the oldest request.
func (f *fetch) newPart() {
	f.seen, f.have = 0, [wire.MaxDigests]bool{}
}

// maxPipeline is how many requests of one batch may be under way.
const maxPipeline = 8

// ask sends requests: a demand read's for all chunks, prefetch's for as many as
// the window has room for, and waits for that room only if nothing is under way.
func (f *fetch) ask(ctx context.Context, st *stream) error {
	for f.asked < len(f.chunks) && len(f.parts) < maxPipeline {
		end := len(f.chunks)
		if f.window != nil {
			var n int64
			end = f.asked
			for share := f.window.share(); end < len(f.chunks) && n < share; end++ {
				n += int64(f.chunks[end].Length)
			}
			if f.forward {
				f.window.add(n)
			} else if len(f.parts) > 0 {
				if !f.window.try(n) {
					return nil
				}
			} else if err := f.window.acquire(ctx, n); err != nil {
				return err
			}
			f.counted += n
		}
		if err := f.pace(ctx, f.chunks[f.asked:end]); err != nil {
			return err
		}
		if err := f.send(ctx, st, f.chunks[f.asked:end]); err != nil {
			return err
		}
		p := part{from: f.asked, end: end}
		for i := p.from; i < end; i++ {
			p.longest = max(p.longest, f.chunks[i].Length)
		}
		f.asked = end
		f.parts = append(f.parts, p)
	}
	return nil
}

// pace waits for the download budget.
func (f *fetch) pace(ctx context.Context, chunks []blockdev.Chunk) error {
	if !f.c.opts.Download.Limited() {
		return nil
	}
	var n int64
	for i := range chunks {
		n += int64(chunks[i].Length)
	}
	if f.c.opts.Download.Take(ctx, string(f.c.keeper.info.ID), f.priority, n) != nil {
		return contextError(ctx)
	}
	return nil
}

// uncount gives back to the window what has not come.
func (f *fetch) uncount() {
	if f.counted > 0 {
		f.window.release(f.counted)
		f.counted = 0
	}
}

func (f *fetch) send(ctx context.Context, st *stream, chunks []blockdev.Chunk) error {
	f.msg.Digests = f.msg.Digests[:0]
	for i := range chunks {
		f.msg.Digests = append(f.msg.Digests, chunks[i].Digest[:]...)
	}
	f.msg.TimeoutMs = 0
	if t, ok := ctx.Deadline(); ok {
		f.msg.TimeoutMs = uint32(min(max(time.Until(t).Milliseconds(), 1), math.MaxUint32))
	}
	b, err := wire.AppendMessage(st.out[:0], &f.msg)
	if err != nil {
		return err
	}
	st.out = b
	st.wait.limit, st.send.limit = f.timeout, f.timeout
	if err := st.send.renew(st.SetWriteDeadline); err != nil {
		return err
	}
	_, err = st.Write(b)
	return err
}

// frame takes one frame, which must be for a chunk of the oldest request under
// way that has not come, or that request's end, which is returned.
func (f *fetch) frame(st *stream) (end *wire.Frame, err error) {
	if err := st.wait.renew(st.SetReadDeadline); err != nil {
		return nil, err
	}
	// The longest frame that is expected here, not the longest there is, so
	// that a lie costs nothing.
	n, p := 0, &f.parts[0]
	if f.seen < p.len() {
		n = int(p.longest)
	}
	buf := f.c.buffers.Get(n + frameOverhead)
	defer f.c.buffers.Put(buf)
	b, err := wire.ReadFrame(st.r, max(n+frameOverhead, maxErrorFrame), *buf)
	if err != nil {
		return nil, err
	}
	f.begun = true
	var fr wire.Frame
	if err := wire.ParseChunkFrame(b, &fr); err != nil {
		return nil, err
	}
	if fr.End {
		return &fr, nil
	}
	if fr.Index >= p.len() || f.have[fr.Index] {
		return nil, fmt.Errorf("frame for chunk %d, which was not requested or has come already: %w", fr.Index, blockdev.ErrCorrupt)
	}
	f.have[fr.Index] = true
	f.seen++
	i := p.from + fr.Index
	if f.window != nil {
		f.window.arrived(int64(f.chunks[i].Length))
		f.counted -= int64(f.chunks[i].Length)
	}
	if fr.Err != nil {
		if f.failed != nil {
			f.failed(f.base+i, fr.Err.Err())
			return nil, nil
		}
		f.missed++
		if f.missing == nil {
			f.missing = fr.Err.Err()
		}
		return nil, nil
	}
	return nil, f.take(i, &f.chunks[i], &fr)
}

// frameOverhead is more than the fields around a chunk's data take;
// maxErrorFrame bounds frames without data.
const (
	frameOverhead = 1 << 10
	maxErrorFrame = 4 << 10
)

// take unpacks and delivers a chunk.
func (f *fetch) take(i int, chunk *blockdev.Chunk, fr *wire.Frame) error {
	if fr.Length != int(chunk.Length) {
		return fmt.Errorf("chunk %s came with %d bytes, and its index says %d: %w", chunk.Digest.Hex(), fr.Length, chunk.Length, blockdev.ErrCorrupt)
	}
	data := fr.Data
	var kept *frame
	if fr.Zstd {
		buf := f.c.buffers.Get(fr.Length)
		defer f.c.buffers.Put(buf)
		var err error
		if data, err = f.c.zstd.decode(*buf, fr.Data, fr.Length); err != nil {
			return fmt.Errorf("chunk %s: %w", chunk.Digest.Hex(), err)
		}
		kept = f.c.opts.Frames.offer(chunk.Digest, fr.Data, fr.Length)
	}
	err := f.deliver(f.base+i, data)
	f.c.opts.Frames.settle(kept, err == nil)
	if err != nil {
		return deliverError{err}
	}
	return nil
}
