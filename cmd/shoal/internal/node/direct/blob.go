package direct

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// blob reads a layer's compressed bytes, and connects again where a connection
// ends early.
type blob struct {
	p    *pass
	l    Layer
	at   int64
	vain int // connections in a row that brought nothing

	mu     sync.Mutex
	rc     io.ReadCloser
	closed bool
}

// Read implements io.Reader.
func (b *blob) Read(buf []byte) (int, error) {
	for {
		if b.at >= b.l.Size {
			return 0, io.EOF
		}
		rc, err := b.connection()
		if err == nil {
			var n int
			n, err = rc.Read(buf[:min(int64(len(buf)), b.l.Size-b.at)])
			b.at += int64(n)
			if n > 0 {
				b.vain = 0
				return n, nil // an error comes again with the next Read, or passes
			}
			if err == nil {
				continue
			}
			b.drop()
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("the connection ended %d bytes early: %w", b.l.Size-b.at, blockdev.ErrUnavailable)
			}
		}
		if b.p.ctx.Err() != nil {
			return 0, context.Cause(b.p.ctx)
		}
		if !errors.Is(err, blockdev.ErrUnavailable) || b.vain >= b.p.s.cfg.Retries {
			return 0, fmt.Errorf("after %d of %d bytes: %w", b.at, b.l.Size, err)
		}
		t := time.NewTimer(b.p.s.cfg.BackOff << b.vain)
		b.vain++
		select {
		case <-t.C:
		case <-b.p.ctx.Done():
			t.Stop()
		}
	}
}

// connection returns the one there is, or makes one.
func (b *blob) connection() (io.ReadCloser, error) {
	b.mu.Lock()
	rc, closed := b.rc, b.closed
	b.mu.Unlock()
	switch {
	case closed: // nobody needs another one
		return nil, context.Canceled
	case rc != nil:
		return rc, nil
	}
	rc, err := b.p.s.cfg.Open(b.p.ctx, b.l, b.at)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		rc.Close()
		return nil, context.Canceled
	}
	b.rc = rc
	return rc, nil
}

// drop gives up a connection that has ended.
func (b *blob) drop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rc != nil {
		b.rc.Close() // it was only read
		b.rc = nil
	}
}

// close ends a Read that waits.
func (b *blob) close() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.drop()
}
