package direct

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// stream reads a layer's compressed bytes, and connects again where a connection
// ends early.
type stream struct {
	p    *pass
	l    images.Origin
	at   int64
	vain int // connections in a row that brought nothing

	mu     sync.Mutex
	rc     io.ReadCloser
	closed bool
}

// Read implements io.Reader.
func (s *stream) Read(buf []byte) (int, error) {
	for {
		if s.at >= s.l.Size {
			return 0, io.EOF
		}
		rc, err := s.connection()
		if err == nil {
			var n int
			n, err = rc.Read(buf[:min(int64(len(buf)), s.l.Size-s.at)])
			s.at += int64(n)
			if n > 0 {
				s.vain = 0
				return n, nil // an error comes again with the next Read, or passes
			}
			if err == nil {
				continue
			}
			s.drop()
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("the connection ended %d bytes early: %w", s.l.Size-s.at, blockdev.ErrUnavailable)
			}
		}
		if s.p.ctx.Err() != nil {
			return 0, context.Cause(s.p.ctx)
		}
		if !errors.Is(err, blockdev.ErrUnavailable) || s.vain >= s.p.s.cfg.Retries {
			return 0, fmt.Errorf("after %d of %d bytes: %w", s.at, s.l.Size, err)
		}
		t := time.NewTimer(s.p.s.cfg.BackOff << s.vain)
		s.vain++
		select {
		case <-t.C:
		case <-s.p.ctx.Done():
			t.Stop()
		}
	}
}

// connection returns the one there is, or makes one.
func (s *stream) connection() (io.ReadCloser, error) {
	s.mu.Lock()
	rc, closed := s.rc, s.closed
	s.mu.Unlock()
	switch {
	case closed: // nobody needs another one
		return nil, context.Canceled
	case rc != nil:
		return rc, nil
	}
	rc, err := s.p.s.cfg.Open(s.p.ctx, s.l, s.at)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		rc.Close()
		return nil, context.Canceled
	}
	s.rc = rc
	return rc, nil
}

// drop gives up a connection that has ended.
func (s *stream) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rc != nil {
		s.rc.Close() // it was only read
		s.rc = nil
	}
}

// close ends a Read that waits.
func (s *stream) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.drop()
}
