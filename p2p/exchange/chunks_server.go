package exchange

import (
	"bufio"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/p2p/wire"
)

// serveChunks answers chunk requests, one after the other, until the client
// closes the stream or leaves it idle.
func (s *Server) serveChunks(st network.Stream) error {
	r := &byteReader{Reader: st}
	from := st.Conn().RemotePeer()
	idle := deadline{limit: s.cfg.Limits.IdleTimeout}
	out := deadline{limit: s.cfg.Limits.WriteTimeout}
	for {
		if err := idle.renew(st.SetReadDeadline); err != nil {
			return err
		}
		b, err := wire.ReadFrame(r, wire.MaxChunkRequest, nil)
		if isEnd(err) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		req, err := wire.ParseChunkRequest(b)
		if err != nil {
			// Said in words, for the authors of that client, and then over.
			invalid := &wire.Error{Code: wire.Code_CODE_INVALID, Text: wire.CleanText(err.Error(), wire.MaxErrorText)}
			return s.refuse(st, &out, invalid)
		}
		if err := s.answerChunks(st, &out, from, req); err != nil {
			return err
		}
	}
}

// query is req for a Provider.
func query(from peer.ID, req *wire.ChunkRequest) *Query {
	q := &Query{From: from, Diff: blockdev.Digest(req.Diff), Hops: int(req.Hops), Digests: make([]blockdev.Digest, req.Count())}
	switch req.Priority {
	case wire.Priority_PRIORITY_DEMAND:
		q.Priority = blockdev.Demand
	case wire.Priority_PRIORITY_STARTUP:
		q.Priority = blockdev.Startup
	}
	if len(req.Group) > 0 {
		q.Group = blockdev.Digest(req.Group)
	}
	for i := range q.Digests {
		q.Digests[i] = req.Digest(i)
	}
	return q
}

// refuse answers a whole request with an error.
func (s *Server) refuse(st network.Stream, out *deadline, e *wire.Error) error {
	b, err := wire.AppendMessage(nil, &wire.ChunkFrame{End: true, Error: e})
	if err != nil {
		return err
	}
	if err := out.renew(st.SetWriteDeadline); err != nil {
		return err
	}
	_, err = st.Write(b)
	return err
}

// answerChunks answers one request. Its error means that the stream is of no
// more use; failures with single chunks are the client's to know.
func (s *Server) answerChunks(st network.Stream, out *deadline, from peer.ID, req *wire.ChunkRequest) (err error) {
	k, q := prefetch, query(from, req)
	switch q.Priority {
	case blockdev.Demand:
		k = demand
	case blockdev.Startup:
		k = startup
	}
	refuse := func(err error) error {
		s.stats.request(k, err)
		return s.refuse(st, out, wire.FromError(err))
	}
	backlog := s.cfg.Limits.PrefetchBacklog
	if k == demand {
		backlog = s.cfg.Limits.DemandBacklog
	}
	if wait := s.cfg.Upload.Wait(string(from), q.Priority); wait > backlog {
		return refuse(fmt.Errorf("the upload limit of %d bytes/s is used up for %v: %w", s.cfg.Upload.Rate(), wait.Round(time.Millisecond), wire.ErrBusy))
	}
	if !s.admit.enter(from, k) {
		return refuse(fmt.Errorf("%s requests of this node, or in all, are at their limit: %w", k, wire.ErrBusy))
	}
	// Left before the last bytes go out: a client at its own limit sends the
	// next request as soon as it has them, and must not find itself counted.
	leave := sync.OnceFunc(func() { s.admit.leave(from, k) })
	defer leave()

	ctx, cancel := s.ctx, context.CancelFunc(func() {})
	if ms := req.TimeoutMs; ms > 0 {
		ctx, cancel = context.WithTimeout(ctx, time.Duration(ms)*time.Millisecond)
	} else if req.Count() > 1 || s.cfg.Provider != nil {
		ctx, cancel = context.WithCancel(ctx)
	}
	defer cancel()

	answer, err := s.source.Provide(ctx, q)
	if err != nil {
		leave()
		return refuse(err)
	}
	defer answer.Close()

	w, _ := s.writers.Get().(*bufio.Writer)
	w.Reset(st)
	defer func() {
		w.Reset(nil)
		s.writers.Put(w)
	}()
	a := chunkAnswer{s: s, st: st, out: out, w: w, from: from, kind: k, req: req, priority: q.Priority, answer: answer, leave: leave}
	defer a.discard(cancel)
	var failed error
	if s.cfg.Provider != nil {
		failed, err = a.runReady(ctx, cancel)
	} else {
		failed, err = a.run(ctx)
	}
	if err == nil {
		s.stats.request(k, failed)
	} else {
		s.stats.request(k, err)
	}
	return err
}

// chunkAnswer is the work on one request: chunks are read from the store ahead
// of the one that is being sent, and sent in order.
type chunkAnswer struct {
	s     *Server
	st    network.Stream
	out   *deadline
	w     *bufio.Writer
	from  peer.ID
	kind  kind
	req   *wire.ChunkRequest
	leave func()

	priority blockdev.Priority
	answer   Answer

	ahead   []chan chunkResult // of chunks taken..started-1, a ring
	taken   int                // how many results have been taken out of ahead
	started int                // how many chunks have been asked of the store
	header  [32]byte
}

type chunkResult struct {
	enc    Encoded
	err    error
	budget bool // holds one of Server.readAhead
}

// maxWaits is how many chunks of one request are waited for at the same time.
const maxWaits = 64

// runReady is run for a Provider: chunks go out as they become ready. cancel ends
// ctx.
func (a *chunkAnswer) runReady(ctx context.Context, cancel context.CancelFunc) (failed, err error) {
	n := a.req.Count()
	ready := make(chan int, min(n, maxWaits))
	started := 0
	start := func() {
		i := started
		started++
		go func() {
			a.answer.Wait(ctx, i)
			ready <- i
		}()
	}
	sent := 0
	defer func() {
		cancel()
		for ; sent < started; sent++ {
			<-ready // nobody is left when answer is closed
		}
	}()
	for range cap(ready) {
		start()
	}
	for sent < n {
		if len(ready) == 0 && a.w.Buffered() > 0 {
			if err := a.w.Flush(); err != nil {
				return failed, err
			}
		}
		i := <-ready // Wait ends with ctx
		sent++
		if started < n {
			start()
		}
		res := a.read(ctx, i)
		if res.err != nil && failed == nil {
			failed = res.err
		}
		if err := a.sendTurn(ctx, i, res); err != nil {
			return failed, err
		}
	}
	return failed, a.sendEnd()
}

// sendTurn sends a chunk when it is its turn: after demand, within the budget.
func (a *chunkAnswer) sendTurn(ctx context.Context, i int, res chunkResult) error {
	defer a.release(res)
	if err := a.pace(ctx, len(res.enc.Data)); err != nil {
		return err
	}
	if a.kind != demand {
		a.s.admit.waitForDemand(ctx, a.from, a.kind)
	}
	return a.send(i, res)
}

func (a *chunkAnswer) sendEnd() error {
	end, err := wire.AppendMessage(nil, &wire.ChunkFrame{End: true})
	if err != nil {
		return err
	}
	if err := a.out.renew(a.st.SetWriteDeadline); err != nil {
		return err
	}
	a.leave()
	if _, err := a.w.Write(end); err != nil {
		return err
	}
	return a.w.Flush()
}

// run sends all chunks and the end. failed is the first chunk's failure that was
// reported to the client; err is that of the stream.
func (a *chunkAnswer) run(ctx context.Context) (failed, err error) {
	n := a.req.Count()
	for i := range n {
		res, err := a.chunk(ctx, n)
		if err != nil {
			return failed, err
		}
		if res.err != nil && failed == nil {
			failed = res.err
		}
		if err := a.sendTurn(ctx, i, res); err != nil {
			return failed, err
		}
	}
	return failed, a.sendEnd()
}

// pace waits for n bytes of the upload budget. What was written before goes out
// if there is a wait.
func (a *chunkAnswer) pace(ctx context.Context, n int) error {
	if !a.s.cfg.Upload.Limited() {
		return nil
	}
	if a.w.Buffered() > 0 {
		if err := a.out.renew(a.st.SetWriteDeadline); err != nil {
			return err
		}
		if err := a.w.Flush(); err != nil {
			return err
		}
	}
	if a.s.cfg.Upload.Take(ctx, string(a.from), a.priority, int64(n)) != nil {
		return contextError(ctx)
	}
	return nil
}

// chunk returns the next chunk, one of n, having started to read those
// behind it. What was written before goes out if there is a wait.
func (a *chunkAnswer) chunk(ctx context.Context, n int) (chunkResult, error) {
	if n == 1 {
		return a.read(ctx, 0), nil // the common demand read: no goroutine, no channel
	}
	if a.ahead == nil {
		a.ahead = make([]chan chunkResult, min(n, a.s.cfg.Limits.ReadAhead+1))
		for i := range a.ahead {
			a.ahead[i] = make(chan chunkResult, 1)
		}
	}
	for a.started < n && a.started-a.taken < len(a.ahead) {
		budget := false
		if a.started > a.taken {
			if budget = a.s.readAhead.TryAcquire(1); !budget {
				break
			}
		}
		i, ch := a.started, a.ahead[a.started%len(a.ahead)]
		a.started++
		go func() {
			res := a.read(ctx, i)
			res.budget = budget
			ch <- res
		}()
	}
	ch := a.ahead[a.taken%len(a.ahead)]
	select {
	case res := <-ch:
		a.taken++
		return res, nil
	default:
	}
	if a.w.Buffered() > 0 {
		if err := a.w.Flush(); err != nil {
			return chunkResult{}, err
		}
	}
	res := <-ch // read has a time limit
	a.taken++
	return res, nil
}

// read reads chunk i from the store.
func (a *chunkAnswer) read(ctx context.Context, i int) (res chunkResult) {
	ctx, cancel := context.WithTimeout(ctx, a.s.cfg.Limits.ChunkTimeout)
	defer cancel()
	if a.kind != demand && a.s.cfg.Provider == nil {
		if err := a.s.prefetchReads.Acquire(ctx, 1); err != nil {
			return chunkResult{err: fmt.Errorf("waiting to read the store: %w", err)}
		}
		defer a.s.prefetchReads.Release(1)
	}
	enc, err := a.answer.Chunk(ctx, i)
	if err == nil {
		if err = enc.check(); err == nil && enc.Zstd && !a.req.AcceptZstd {
			err = a.s.unpack(&enc)
		}
		if err != nil {
			enc.release()
		}
	}
	if err != nil {
		return chunkResult{err: fmt.Errorf("chunk %s: %w", a.req.Digest(i).Hex(), err)}
	}
	return chunkResult{enc: enc}
}

// unpack replaces a compressed chunk by a plain one, in a lent buffer.
func (s *Server) unpack(enc *Encoded) error {
	buf := s.buffers.Get(int(enc.Length))
	raw, err := s.zstd.decode(*buf, enc.Data, int(enc.Length))
	if err != nil {
		s.buffers.Put(buf)
		return err
	}
	enc.release()
	*enc = Encoded{Data: raw, Length: uint32(len(raw)), Release: func() { s.buffers.Put(buf) }}
	return nil
}

// send writes one chunk, or why there is none.
func (a *chunkAnswer) send(i int, res chunkResult) error {
	if err := a.out.renew(a.st.SetWriteDeadline); err != nil {
		return err
	}
	if res.err != nil {
		b, err := wire.AppendMessage(nil, &wire.ChunkFrame{Index: uint32(i), Error: wire.FromError(res.err)})
		if err != nil {
			return err
		}
		_, err = a.w.Write(b)
		return err
	}
	e := &res.enc
	if _, err := a.w.Write(wire.AppendChunkHeader(a.header[:0], i, e.Zstd, int(e.Length), len(e.Data))); err != nil {
		return err
	}
	if _, err := a.w.Write(e.Data); err != nil {
		return err
	}
	a.s.stats.chunks[a.kind].Inc()
	a.s.stats.bytes[a.kind].Add(float64(len(e.Data)))
	return nil
}

func (a *chunkAnswer) release(res chunkResult) {
	res.enc.release()
	if res.budget {
		a.s.readAhead.Release(1)
	}
}

// discard waits for what was read ahead and not sent, after a failure.
func (a *chunkAnswer) discard(cancel context.CancelFunc) {
	cancel()
	for ; a.taken < a.started; a.taken++ {
		a.release(<-a.ahead[a.taken%len(a.ahead)])
	}
}
