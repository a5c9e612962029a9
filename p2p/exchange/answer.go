package exchange

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

	"github.com/shoalfs/shoal/p2p/wire"
)

// answer writes the frames of the answer to a stream's one request.
type answer struct {
	s     *Server
	st    network.Stream
	buf   []byte
	leave func() // nil: nothing to leave
}

// request reads the one request of a stream; io.EOF: there is none.
func (a *answer) request(limit int) ([]byte, error) {
	if err := a.st.SetReadDeadline(time.Now().Add(a.s.cfg.Limits.IdleTimeout)); err != nil {
		return nil, err
	}
	b, err := wire.ReadFrame(&byteReader{Reader: a.st}, limit, nil)
	if err != nil && !isEnd(err) {
		err = fmt.Errorf("read request: %w", err)
	}
	return b, err
}

// enter counts the request; an error is for the client to know.
func (a *answer) enter(k kind, what string) error {
	from := a.st.Conn().RemotePeer()
	if !a.s.admit.enter(from, k) {
		a.s.stats.request(k, wire.ErrBusy)
		return fmt.Errorf("requests for %s of this node, or in all, are at their limit: %w", what, wire.ErrBusy)
	}
	// Left before the last bytes go out, as for chunks.
	a.leave = sync.OnceFunc(func() { a.s.admit.leave(from, k) })
	return nil
}

func (a *answer) write(m proto.Message) (err error) {
	if a.buf, err = wire.AppendMessage(a.buf[:0], m); err != nil {
		return err
	}
	if err := a.st.SetWriteDeadline(time.Now().Add(a.s.cfg.Limits.WriteTimeout)); err != nil {
		return err
	}
	_, err = a.st.Write(a.buf)
	return err
}

// last writes the frame that ends the answer.
func (a *answer) last(m proto.Message) error {
	a.done()
	return a.write(m)
}

// holds says that the answer has a place of sending, which done gives back, too.
func (a *answer) holds(sending *semaphore.Weighted) {
	leave := a.leave
	a.leave = sync.OnceFunc(func() { sending.Release(1); leave() })
}

// done ends what enter has counted.
func (a *answer) done() {
	if a.leave != nil {
		a.leave()
	}
}

// await runs work and calls tick soon, and then every interval while it goes on, so that
// the client knows that somebody is at it. Thousands that wait for the same image began
// at the same time: the second tick comes early by chance, so that theirs do not all
// come at once. An error of tick, as the client is gone, ends the work.
func (a *answer) await(interval time.Duration, work func(context.Context), tick func(first bool) error) error {
	ctx, cancel := context.WithCancel(a.s.ctx)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		work(ctx)
	}()
	t := time.NewTicker(min(interval, a.s.cfg.Limits.FirstSign))
	defer t.Stop()
	for n := 0; ; n++ {
		select {
		case <-done:
			return nil
		case <-t.C:
			switch n {
			case 0:
				t.Reset(interval/2 + rand.N(interval/2+1))
			case 1:
				t.Reset(interval)
			}
			if err := tick(n == 0); err != nil {
				cancel()
				<-done
				return err
			}
		}
	}
}

// linger waits for the client to close: when it has read the end. Until then a
// reset of ours could overtake what is under way.
func (a *answer) linger() error {
	if err := a.st.SetReadDeadline(time.Now().Add(a.s.cfg.Limits.WriteTimeout)); err != nil {
		return err
	}
	_, _ = io.CopyN(io.Discard, a.st, 1)
	return nil
}

func invalid(err error) *wire.Error {
	return &wire.Error{Code: wire.Code_CODE_INVALID, Text: wire.CleanText(err.Error(), wire.MaxErrorText)}
}
