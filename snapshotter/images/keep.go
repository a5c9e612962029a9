package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// Keep opens an image that containerd has not asked for, so that it can be
// prefetched: it adds and mounts all of its diffs, and keeps them until the image
// has been pulled, or is evicted, also across restarts. An image that is on this
// node as a lazy one already is not kept: its snapshots do that. A zero manifest is
// what ref names now. Errors are those of image.Source.
func (c *Catalogue) Keep(ctx context.Context, ref string, manifest blockdev.Digest) (Image, error) {
	w, err := NewWant(ref, manifest)
	if err != nil {
		return Image{}, err
	}
	cred, err := c.rights.node(ctx, w)
	if err != nil {
		return Image{}, err
	}
	return c.keep(ctx, w, cred)
}

// KeepAs is Keep on the word of this credential instead of the node's own.
func (c *Catalogue) KeepAs(ctx context.Context, ref string, manifest blockdev.Digest, cred image.Credential) (Image, error) {
	w, err := NewWant(ref, manifest)
	if err != nil {
		return Image{}, err
	}
	return c.keep(ctx, w, cred)
}

func (c *Catalogue) keep(ctx context.Context, w Want, cred image.Credential) (Image, error) {
	o, err := c.opener.open(ctx, w, cred)
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", w.Ref, err)
	}
	defer o.release()
	img := Image{Ref: w.Ref, Manifest: o.Manifest, Layers: o.Layers}
	chains, err := c.snapshots.Chains(ctx)
	if err != nil {
		return Image{}, err
	}
	if _, ok := chains[o.Top]; ok {
		return img, nil
	}
	changed, err := c.records.keep(&o.imageRecord)
	if err != nil {
		return Image{}, err
	}
	if changed {
		c.refs.keep(o.diffs(), 1)
	}
	img.Kept = true
	return img, nil
}

// Pin keeps a kept image from being evicted until release is called.
func (c *Catalogue) Pin(ctx context.Context, img Image) (release func(), err error) {
	rec := imageRecord{Layers: img.Layers}
	return c.refs.hold(ctx, rec.diffs()...)
}

// Evict frees room on the data path: unused diffs, or else the kept image
// that was opened longest ago and has diffs that no other image uses. It reports
// whether there was any. What a snapshot uses is never evicted.
func (c *Catalogue) Evict(ctx context.Context) bool {
	if c.sweep(ctx) > 0 {
		return true
	}
	list, err := c.records.images()
	if err != nil {
		c.log.Error("cannot find images to evict", "error", err)
		return false
	}
	slices.SortFunc(list, func(a, b imageRecord) int { return a.Opened.Compare(b.Opened) })
	for _, img := range list {
		if !img.Kept || !c.refs.onlyKept(img.diffs()) {
			continue
		}
		if err := c.release(img.Manifest); err != nil {
			c.log.Error("cannot evict an image", "image", img.Ref, "error", err)
			continue
		}
		c.log.Info("evicted an image that was prefetched and not pulled, to make room", "image", img.Ref, "opened", img.Opened)
		if c.sweep(ctx) > 0 {
			return true
		}
	}
	return false
}

// release ends the keeping of an image.
func (c *Catalogue) release(manifest blockdev.Digest) error {
	released, err := c.records.release(manifest)
	for _, img := range released {
		c.refs.keep(img.diffs(), -1)
	}
	return err
}

// Cleanup removes the diffs that nobody uses any more, and forgets images that are gone.
func (c *Catalogue) Cleanup(ctx context.Context) error {
	c.sweep(ctx)
	if err := c.prune(ctx); err != nil {
		return err
	}
	return c.dropKeys()
}

// sweep removes the diffs that nobody uses from the data path, and says how many.
// Before Start it knows of none.
func (c *Catalogue) sweep(ctx context.Context) (removed int) {
	unused := c.refs.unused()
	if len(unused) == 0 || c.snapshots.Lost() {
		return 0
	}
	for _, id := range unused {
		if ctx.Err() != nil {
			return removed
		}
		if !c.refs.startRemove(id) {
			continue
		}
		err := c.removeDiff(ctx, id)
		c.refs.finishRemove(id, err == nil)
		if err != nil {
			c.log.Warn("cannot remove an unused diff", "diff", id, "error", err)
		} else {
			removed++
		}
	}
	return removed
}

func (c *Catalogue) removeDiff(ctx context.Context, id blockdev.Digest) error {
	if err := c.cfg.Data.Remove(ctx, id); err != nil && !errors.Is(err, blockdev.ErrNotFound) {
		return err
	}
	if err := c.groups.without(id); err != nil {
		return err
	}
	return c.records.forget(id)
}

// prune drops records of images whose top layer has no snapshot, that are not
// kept, and that no pull is opening. The snapshots are looked at while no record can
// change: a pull commits the top layer first and notes its end in the record then, so it
// is seen here, or writes the record again.
func (c *Catalogue) prune(ctx context.Context) error {
	gone, left, err := c.records.prune(func(list []imageRecord) (stale []imageRecord, err error) {
		chains, err := c.snapshots.Chains(ctx)
		if err != nil {
			return nil, err
		}
		for _, img := range list {
			underWay := !img.Pulled && time.Since(img.Opened) < c.cfg.PullIdle
			if _, ok := chains[img.Top]; !ok && !img.Kept && !underWay {
				stale = append(stale, img)
			}
		}
		return stale, nil
	})
	if err != nil {
		return err
	}
	for _, img := range gone {
		c.groups.leave(img.Manifest, left)
	}
	return nil
}
