package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// pullKey tells pulls apart. containerd says nowhere that a pull begins or ends.
type pullKey struct {
	namespace string
	ref       string
	manifest  blockdev.Digest
}

// Pull is one Prepare's part in the pull of an image. It ends with Leave or Abandon.
type Pull struct {
	c     *Catalogue
	pull  *pull
	key   pullKey
	want  Want
	chain string // ChainID of the layer that is asked for
}

// Join says that a layer of an image, which will have this ChainID, is asked for in a
// namespace of containerd.
func (c *Catalogue) Join(namespace, chain string, w Want) *Pull {
	key := pullKey{namespace: namespace, ref: w.Ref, manifest: w.Manifest}
	p := c.pulls.join(key, chain, func() *opening {
		c.rights.claim(w.Name)
		return c.openings.join(w.key(), false, attempt{ref: w.Ref, open: func(ctx context.Context) (*Opened, error) {
			cred, err := c.rights.pull(ctx, w)
			if err != nil {
				return nil, err
			}
			return c.opener.open(ctx, w, cred)
		}})
	})
	return &Pull{c: c, pull: p, key: key, want: w, chain: chain}
}

// Layer waits for the image, and returns it with the number of the layer that is asked
// for. Without an image and an error, the layer is not lazy, and the log says why. An
// error is ErrClosed, or what has ended ctx.
func (p *Pull) Layer(ctx context.Context) (*Opened, int, error) {
	c, w := p.c, p.want
	o, err := c.pulls.wait(ctx, p.pull)
	if why := c.policy.Load().NotLazy(w.Ref); why != "" && err == nil {
		err = refused(why) // the mirror may not have known the image by this name
	}
	switch {
	case c.tasks.Context().Err() != nil:
		return nil, 0, ErrClosed
	case errors.Is(err, ErrSlow):
		return nil, 0, err
	case ctx.Err() != nil && !errors.Is(context.Cause(ctx), ErrSlow):
		return nil, 0, fmt.Errorf("image %s: wait for its indexes: %w", w.Ref, context.Cause(ctx))
	case errors.As(err, new(refused)):
		c.pulls.refuse(p.pull, true)
		p.pull.explain.Do(func() {
			c.refusals.add(w.Ref, CauseConfig, err.Error())
			c.log.Info("image is not lazy, because the config says so; containerd unpacks it", "image", w.Ref, "error", err)
		})
		return nil, 0, nil
	case err != nil && p.pull.opening.ahead && errors.Is(err, blockdev.ErrUnsupported):
		c.pulls.refuse(p.pull, false)
		c.impossible(p.pull.opening, err)
		return nil, 0, nil
	case err != nil:
		p.Refuse(CauseOf(err), cause(err, c.cfg.IndexTimeout))
		return nil, 0, nil
	case o == nil:
		return nil, 0, nil
	}
	if ns := p.key.namespace; o.private && c.rights.distrusted(ns, time.Now()) {
		p.Refuse(CauseUnauthorized, fmt.Sprintf("containerd's namespace %q has asked for layers without the name of their image within the last %v, "+
			"so the name could come from any manifest, and a private image is opened for none of them: "+
			"set disable_snapshot_annotations = false in the CRI section of containerd's config", ns, distrustFor))
		return nil, 0, nil
	}
	i := slices.Index(o.Chains, p.chain)
	if i < 0 {
		// Not what containerd has, or labels that lie: it is of no use to this pull.
		c.pulls.refuse(p.pull, true)
		p.Refuse(CauseCorrupt, "the DiffIDs that the supernode sent do not give the ChainID that containerd has from the image config")
		return nil, 0, nil
	}
	return o, i, nil
}

// Refuse makes the pull one that is not lazy. The first one is written to the log.
func (p *Pull) Refuse(cause Cause, why string) {
	p.c.pulls.refuse(p.pull, false)
	p.pull.explain.Do(func() { p.c.refusals.warn(p.want.Ref, cause, why, "manifest", p.want.Manifest) })
}

// Rename puts an image that the mirror has opened on record under the name that
// containerd has for it.
func (p *Pull) Rename(o *Opened) (err error) {
	if o.Ref != p.want.Ref {
		p.pull.name.Do(func() { err = p.c.records.rename(o.imageRecord, p.want.Ref) })
	}
	return err
}

// WaitBytes waits until every byte of the image is here and proven. What is missing when
// ctx ends is still being fetched.
func (p *Pull) WaitBytes(ctx context.Context, o *Opened) {
	if layer, err := p.c.opener.fetchAll(ctx, o); err != nil {
		p.c.log.Info("the pull does not wait for all bytes of the image; the missing bytes are still being fetched",
			"image", p.want.Ref, "layer", layer, "error", err)
	}
}

// Done notes that all layers of the image are snapshots, and has it fetched if no
// container follows.
func (p *Pull) Done(o *Opened) {
	c, rec := p.c, o.imageRecord
	rec.Ref = p.want.Ref
	if err := c.release(o.Manifest); err != nil {
		c.log.Error("cannot remove the keep mark of an image; if the image is removed, its diffs stay until the next start",
			"image", rec.Ref, "error", err)
	}
	c.refusals.forget(rec.Ref)
	c.cfg.Pulled(rec.Ref, nil)
	c.rights.drop(p.want.key()) // the next pull shows its own
	unfollowed := c.wantedWhole(rec.Ref)
	if err := c.records.pulled(rec, unfollowed); err != nil {
		c.log.Error("cannot record a pull; if the node restarts, the rest of the image is not prefetched before a container starts", "image", rec.Ref, "error", err)
	}
	if unfollowed {
		c.wishes.await(&rec)
	}
}

// Leave says that the layer has been answered, lazy or not; last: there is none above it.
func (p *Pull) Leave(last bool) { p.c.pulls.leave(p.key, p.pull, p.chain, last) }

// Abandon says that the layer has not been answered.
func (p *Pull) Abandon() { p.c.pulls.leave(p.key, p.pull, "", false) }

// attempt is what opens the wanted image on the word of a credential.
func (op *opener) attempt(w Want, cred image.Credential) attempt {
	return attempt{ref: w.Ref, cred: cred, open: func(ctx context.Context) (*Opened, error) { return op.open(ctx, w, cred) }}
}

// Unlabelled refuses a layer, which will have this ChainID, on one with the ChainID below
// (empty: it is the lowest): containerd has not said which image it belongs to. The log
// says so once, for the lowest layer that is asked for.
func (c *Catalogue) Unlabelled(namespace, chain, below, ref string, why error) {
	c.rights.distrust(namespace, time.Now())
	if c.refusals.lowest(chain, below) {
		c.refusals.warn(ref, CauseUnlabelled, why.Error(), "chain", chain)
	}
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

// join returns the pull for key, with what begin returns if there is none yet. leave
// must follow.
func (ps *pulls) join(key pullKey, chain string, begin func() *opening) *pull {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.m[key]
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
	return p
}

// wait returns the image of a pull that is lazy, and nil if the pull is not: since
// its opening failed, which is err then, or did not end within ctx, or an earlier
// layer was refused.
func (ps *pulls) wait(ctx context.Context, p *pull) (*Opened, error) {
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
