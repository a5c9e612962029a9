package direct

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/defaults"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// Config of a Source. Origins and Open are required; what else is zero gets its
// default.
type Config struct {
	// Origins returns the layers that have a diff, best first; an error or none if
	// there is no such.
	Origins func(diff blockdev.Digest) ([]images.Origin, error)
	// Open opens a layer's blob at offset (0..Size). ctx ends the reading, too.
	// Errors wrap those of blockdev.
	Open func(ctx context.Context, l images.Origin, offset int64) (io.ReadCloser, error)
	// Keep is offered every chunk and piece of a diff that no read has asked for. It
	// must not keep data, and may be called from several goroutines.
	Keep func(diff, chunk blockdev.Digest, data []byte)
	// Passes is how many layers are read at a time; default 3.
	Passes int
	// Linger is how long a pass goes on that no read waits for; default 3 s.
	Linger time.Duration
	// Retries bounds the connections in a row that bring no byte; default 3.
	Retries int
	// BackOff is the pause before the second of them, in which it doubles; default
	// 200 ms.
	BackOff time.Duration
	// Workers is how many goroutines hash the chunks of one pass; default 1.
	Workers int
	// Log gets a line for each pass; default: nothing is logged.
	Log *slog.Logger
}

// Source is a blockdev.Source.
type Source struct {
	cfg    Config
	places chan struct{}
	life   context.Context // ends with Close
	end    context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	closed bool
	passes map[blockdev.Digest]*pass
}

var _ blockdev.Source = (*Source)(nil)

var errClosed = fmt.Errorf("it is closed: %w", blockdev.ErrUnavailable)

// New returns a Source. Close it.
func New(cfg Config) (*Source, error) {
	if cfg.Origins == nil || cfg.Open == nil {
		return nil, errors.New("direct: Origins and Open are required")
	}
	defaults.Positive(&cfg.Passes, 3)
	defaults.Positive(&cfg.Linger, 3*time.Second)
	defaults.Positive(&cfg.Retries, 3)
	defaults.Positive(&cfg.BackOff, 200*time.Millisecond)
	defaults.Positive(&cfg.Workers, 1)
	defaults.Log(&cfg.Log)
	s := &Source{cfg: cfg, places: make(chan struct{}, cfg.Passes), passes: make(map[blockdev.Digest]*pass)}
	s.life, s.end = context.WithCancel(context.Background())
	return s, nil
}

// Close ends all passes, and waits for them.
func (s *Source) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.end()
	s.wg.Wait()
	return nil
}

// call is one call of Fetch.
type call struct {
	items chan item
	gone  chan struct{} // closed when the call has ended
	left  map[int]struct{}
}

// item is a chunk for a call.
type item struct {
	i    int
	data []byte
}

// callItems is how many chunks wait for a call; a pass waits when there are more.
const callItems = 8

// Fetch implements blockdev.Source. It ends when the pass has brought all chunks
// or cannot bring more; how long that takes, the caller bounds.
func (s *Source) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	c := &call{items: make(chan item, callItems), gone: make(chan struct{}), left: make(map[int]struct{}, len(req.Chunks))}
	for i, ch := range req.Chunks {
		if ch.Length == 0 || ch.Length > blockdev.MaxChunk {
			return fmt.Errorf("chunk %s of %d bytes: %w", ch.Digest, ch.Length, blockdev.ErrCorrupt)
		}
		c.left[i] = struct{}{}
	}
	defer close(c.gone)
	for len(c.left) > 0 {
		if ctx.Err() != nil {
			return fmt.Errorf("registry: %w", context.Cause(ctx))
		}
		p, whole, err := s.join(req, c)
		if err != nil {
			return fmt.Errorf("registry: %w", err)
		}
		err = s.collect(ctx, p, c, req, deliver)
		s.leave(p, c)
		switch {
		case err != nil:
			return err
		case len(c.left) == 0:
			return nil
		case p.err != nil && !errors.Is(p.err, errRestart):
			return fmt.Errorf("registry: %w", p.err)
		case p.err == nil && whole:
			return fmt.Errorf("registry: %s has no such chunk (%d of %d): %w", p.name(), len(c.left), len(req.Chunks), blockdev.ErrNotFound)
		}
		// The pass had begun before this call came: again from the start.
	}
	return nil
}

// collect delivers what the pass brings until it is over or nothing is left. An
// error is one that ends the call.
func (s *Source) collect(ctx context.Context, p *pass, c *call, req blockdev.Request, deliver blockdev.Deliver) error {
	take := func(it item) error {
		if _, open := c.left[it.i]; !open {
			return nil
		}
		// The pass has hashed it; its length is the digest's, and not the request's.
		if len(it.data) != int(req.Chunks[it.i].Length) {
			return fmt.Errorf("registry: chunk %s has %d bytes, and %d were requested: %w",
				req.Chunks[it.i].Digest, len(it.data), req.Chunks[it.i].Length, blockdev.ErrCorrupt)
		}
		if err := deliver(it.i, it.data); err != nil {
			return err
		}
		delete(c.left, it.i)
		return nil
	}
	for len(c.left) > 0 {
		select {
		case it := <-c.items:
			if err := take(it); err != nil {
				return err
			}
		case <-p.done:
			for {
				select {
				case it := <-c.items:
					if err := take(it); err != nil {
						return err
					}
					continue
				default:
				}
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("registry: %w after %s", context.Cause(ctx), p.progress())
		}
	}
	return nil
}

// join makes the diff's pass bring what is left of a call, and starts one if there
// is none. whole: the pass has not begun, so all of the layer will go by.
func (s *Source) join(req blockdev.Request, c *call) (p *pass, whole bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false, errClosed
	}
	p = s.passes[req.Diff]
	if p == nil {
		p = s.start(req.Diff)
	}
	if p.idle != nil {
		p.idle.Stop()
		p.idle = nil
	}
	p.calls[c] = struct{}{}
	for i := range c.left {
		d := req.Chunks[i].Digest
		if _, gone := p.passed[d]; gone {
			p.late++
			continue
		}
		p.wanted[d] = append(p.wanted[d], want{c, i})
	}
	whole = !p.begun
	p.check()
	return p, whole, nil
}

// leave takes a call out of a pass.
func (s *Source) leave(p *pass, c *call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(p.calls, c)
	for d, ws := range p.wanted {
		k := 0
		for _, w := range ws {
			if w.c != c {
				ws[k] = w
				k++
			}
		}
		if p.wanted[d] = ws[:k]; k == 0 {
			delete(p.wanted, d)
		}
	}
	if len(p.calls) == 0 && !p.over && s.passes[p.diff] == p {
		p.idle = time.AfterFunc(s.cfg.Linger, func() { s.expire(p) })
	}
}

// expire ends a pass that nobody waits for.
func (s *Source) expire(p *pass) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(p.calls) == 0 {
		p.cancel(errIdle)
	}
}

// put takes a chunk that goes by, and hands it to those that wait for it.
func (p *pass) put(ctx context.Context, d blockdev.Digest, data []byte) error {
	s := p.s
	s.mu.Lock()
	ws := p.wanted[d]
	delete(p.wanted, d)
	p.passed[d] = struct{}{}
	p.bytes += int64(len(data))
	p.check()
	s.mu.Unlock()
	if len(ws) == 0 {
		if s.cfg.Keep != nil {
			s.cfg.Keep(p.diff, d, data)
		}
		return nil
	}
	data = bytes.Clone(data)
	for _, w := range ws {
		select {
		case w.c.items <- item{w.i, data}:
		case <-w.c.gone:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
