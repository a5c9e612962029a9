package direct

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/layer"
	"github.com/shoalfs/shoal/internal/blob"
	"github.com/shoalfs/shoal/snapshotter/images"
)

var (
	// errIdle ends a pass that nobody waits for; no caller sees it.
	errIdle = errors.New("no read waits any more")
	// errRestart ends a pass where all that is waited for has gone by.
	errRestart = errors.New("the requested bytes are behind the read position")
)

// want is a chunk that a call waits for.
type want struct {
	c *call
	i int
}

// pass is one download of one layer. Its fields but the first few are guarded by
// Source.mu.
type pass struct {
	s      *Source
	diff   blockdev.Digest
	ctx    context.Context // of the pass
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when err is set
	err    error         // nil: all of the layer has gone by

	layer  images.Origin // that is being read
	begun  bool
	over   bool
	bytes  int64 // uncompressed, that have gone by
	calls  map[*call]struct{}
	wanted map[blockdev.Digest][]want
	passed map[blockdev.Digest]struct{}
	late   int // chunks asked for after they had passed
	idle   *time.Timer
}

// start makes the pass of a diff; mu is held.
func (s *Source) start(diff blockdev.Digest) *pass {
	p := &pass{
		s: s, diff: diff, done: make(chan struct{}), calls: make(map[*call]struct{}),
		wanted: make(map[blockdev.Digest][]want), passed: make(map[blockdev.Digest]struct{}),
	}
	p.ctx, p.cancel = context.WithCancelCause(s.life)
	s.passes[diff] = p
	s.wg.Go(p.run)
	return p
}

// check ends a pass early where nothing is waited for but what has gone by; mu is
// held.
func (p *pass) check() {
	if p.late > 0 && len(p.wanted) == 0 {
		p.cancel(errRestart)
	}
}

func (p *pass) run() {
	defer p.cancel(nil)
	began := time.Now()
	err := p.through()
	if err != nil && p.ctx.Err() != nil {
		if err = context.Cause(p.ctx); errors.Is(err, context.Canceled) {
			err = errClosed
		}
	}
	s := p.s
	s.mu.Lock()
	p.over = true
	if s.passes[p.diff] == p {
		delete(s.passes, p.diff)
	}
	if p.idle != nil {
		p.idle.Stop()
	}
	// A caller that has come since the timer fired starts again.
	if errors.Is(err, errIdle) {
		err = errRestart
	}
	p.err = err
	n := p.bytes
	s.mu.Unlock()
	close(p.done)
	s.cfg.Log.Info("read a layer straight from its registry", "diff", p.diff, "image", p.layer.Ref, "layer", p.layer.Digest,
		"bytes", n, "took", time.Since(began).Round(time.Millisecond), "end", err)
}

// through tries the layers that have the diff until one has been read to its end.
func (p *pass) through() error {
	s := p.s
	select {
	case s.places <- struct{}{}:
		defer func() { <-s.places }()
	case <-p.ctx.Done():
		return context.Cause(p.ctx)
	}
	layers, err := s.cfg.Origins(p.diff)
	if err != nil {
		return fmt.Errorf("which image has diff %s: %w", p.diff, err)
	}
	err = fmt.Errorf("no image on this node has diff %s: %w", p.diff, blockdev.ErrNotFound)
	for _, l := range layers {
		s.mu.Lock()
		p.layer = l
		p.begun = true
		s.mu.Unlock()
		if err = p.read(l); err == nil || p.ctx.Err() != nil {
			return err
		}
		err = fmt.Errorf("image %s, layer %s: %w", l.Ref, l.Digest, err)
	}
	return err
}

func (p *pass) read(l images.Origin) error {
	r := &stream{p: p, l: l}
	defer r.close()
	// Close also ends a Read that does not look at the context.
	defer context.AfterFunc(p.ctx, r.close)()
	tar, err := blob.Decompress(r)
	if err != nil {
		return err
	}
	defer tar.Close()
	// The digests that come are computed from the bytes. Whether the index is that
	// of the layer is for the proof to say (blockdev/cache).
	_, err = layer.Build(p.ctx, tar, p.put, layer.Options{Workers: p.s.cfg.Workers})
	return err
}

func (p *pass) name() string {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	return fmt.Sprintf("image %s, layer %s", p.layer.Ref, p.layer.Digest)
}

// progress says how far a pass is, for the error of a caller that gives up.
func (p *pass) progress() string {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	if !p.begun {
		return "waiting for other layers to be read"
	}
	return fmt.Sprintf("%d MiB of image %s, layer %s", p.bytes>>20, p.layer.Ref, p.layer.Digest)
}
