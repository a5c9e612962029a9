package snapshotter

import (
	"context"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
)

// pullKey tells pulls apart. containerd says nowhere that a pull begins or ends.
type pullKey struct {
	namespace string
	ref       string
	manifest  blockdev.Digest
}

// pull is one decision, for all layers of an image: lazy or not. It is made once,
// however many Prepares wait for it, and stands until the pull's last layer has
// been answered, a layer is asked for a second time (so this is a new pull), or
// nothing has been asked for a while.
type pull struct {
	opening *opening
	explain sync.Once // the one line that says why not
	name    sync.Once // the image is on record by its name

	// Below here under pulls.mu.
	refused bool // not lazy, whatever the opening comes to
	useless bool // so is the opening
	left    bool // opening is not used any more
	users   int
	over    bool // no longer in pulls.m
	served  map[string]struct{}
	idle    *time.Timer
}

// pulls holds the decisions.
type pulls struct {
	mu     sync.Mutex
	m      map[pullKey]*pull
	closed bool

	openings *openings
	idle     time.Duration
}

// join returns the pull for key, with what begin returns if there is none yet.
// leave must be called when the layer has been answered, saying whether that was
// the last one; abandon instead if it has not been.
func (ps *pulls) join(key pullKey, chain string, begin func() *opening) (p *pull, leave func(last bool), abandon func()) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p = ps.m[key]
	if p != nil {
		if _, again := p.served[chain]; again {
			ps.endLocked(key, p, false)
			p = nil
		}
	}
	if p == nil {
		p = &pull{opening: begin(), served: make(map[string]struct{})}
		if ps.m == nil {
			ps.m = make(map[pullKey]*pull)
		}
		if !ps.closed {
			ps.m[key] = p
		}
	}
	p.users++
	if p.idle != nil {
		p.idle.Stop()
		p.idle = nil
	}
	return p, func(last bool) { ps.leave(key, p, chain, last) }, func() { ps.leave(key, p, "", false) }
}

// wait returns the image of a pull that is lazy, and nil if the pull is not: since
// its opening failed, which is err then, or did not end within ctx, or an earlier
// layer was refused.
func (ps *pulls) wait(ctx context.Context, p *pull) (*openImage, error) {
	ps.mu.Lock()
	refused := p.refused
	ps.mu.Unlock()
	if refused {
		return nil, nil
	}
	select {
	case <-p.opening.done:
	default:
		select {
		case <-p.opening.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if p.refused {
		return nil, nil
	}
	return p.opening.image, p.opening.err
}

// refuse makes a pull one that is not lazy. useless: nor will its opening make the
// next one lazy, if it was begun for this one.
func (ps *pulls) refuse(p *pull, useless bool) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p.refused = true
	p.useless = p.useless || useless
}

// leave ends one caller's use of a decision. An empty chain: without an answer.
func (ps *pulls) leave(key pullKey, p *pull, chain string, last bool) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p.users--
	if chain != "" {
		p.served[chain] = struct{}{}
	}
	switch {
	case last:
		ps.endLocked(key, p, true)
	case p.users > 0:
	case p.over:
		ps.dropLocked(p, false)
	default:
		if p.refused {
			ps.dropLocked(p, false)
		}
		p.idle = time.AfterFunc(ps.idle, func() { ps.expire(key, p) })
	}
}

func (ps *pulls) expire(key pullKey, p *pull) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if !ps.closed && !p.over && p.users == 0 {
		ps.endLocked(key, p, false)
	}
}

// endLocked makes the next Prepare a new pull.
func (ps *pulls) endLocked(key pullKey, p *pull, finished bool) {
	if !p.over {
		p.over = true
		if ps.m[key] == p {
			delete(ps.m, key)
		}
	}
	if p.idle != nil {
		p.idle.Stop()
		p.idle = nil
	}
	if p.users == 0 {
		ps.dropLocked(p, finished)
	}
}

// dropLocked ends the pull's use of its opening.
func (ps *pulls) dropLocked(p *pull, finished bool) {
	if !p.left {
		p.left = true
		ps.openings.leave(p.opening, finished || p.useless && !p.opening.ahead)
	}
}

// close ends all pulls.
func (ps *pulls) close() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.closed = true
	for key, p := range ps.m {
		ps.endLocked(key, p, false)
	}
}
