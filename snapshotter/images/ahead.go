package images

import (
	"context"
	"errors"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// The registry mirror sees a pull before this package does, with the credential
// that containerd has for it. What it reports here (Show, Begin) is the only thing
// that opens a private image: labels of a snapshot can come from anybody's manifest.

// Show implements mirror.Opener: a pull has been given this manifest, or image
// index, on the word of the registry for this credential. name is host/repository.
func (c *Catalogue) Show(name string, manifest blockdev.Digest, cred image.Credential) {
	c.rights.show(openKey{name: name, manifest: manifest}, cred, time.Now())
}

// Begin implements mirror.Opener: it begins to open an image on the word of the
// registry for this credential, and returns at once. Of the layers that are here, no
// index is fetched again.
func (c *Catalogue) Begin(name, tag string, manifest blockdev.Digest, layers []blockdev.Digest, cred image.Credential) {
	ref := name + "@" + manifest.String()
	if tag != "" {
		ref = name + ":" + tag
	}
	w, err := NewWant(ref, manifest)
	if err != nil || c.policy.Load().NotLazy(w.Ref) != "" {
		return
	}
	w.Layers = layers
	c.Show(name, manifest, cred)
	if c.rights.elsewhere(name) || c.here(manifest) {
		return
	}
	c.openings.leave(c.openings.join(w.key(), true, c.opener.attempt(w, cred)), false)
}

// Await implements mirror.Opener: it returns when containerd may begin to unpack
// the image: it is open, and for an eager one every byte is here and proven; it
// cannot be opened; or ctx has ended.
func (c *Catalogue) Await(ctx context.Context, name string, manifest blockdev.Digest) {
	key := openKey{name: name, manifest: manifest}
	for attempt := 0; ; attempt++ {
		o := c.openings.find(key)
		if o == nil {
			return
		}
		select {
		case <-o.done:
		case <-ctx.Done():
			c.openings.leave(o, false)
			return
		}
		if o.err == nil {
			if c.policy.Load().Eager(o.image.Ref) {
				c.waitEager(ctx, o.image)
			}
			c.openings.leave(o, false)
			return
		}
		c.openings.leave(o, false)
		// It may have been somebody else's credential that was refused.
		cred, ok := c.rights.find(key, time.Now())
		if attempt > 0 || !ok || cred == o.cred || !errors.Is(o.err, blockdev.ErrUnauthorized) {
			return
		}
		w, err := NewWant(name+"@"+manifest.String(), manifest)
		if err != nil {
			return
		}
		c.openings.leave(c.openings.join(key, true, c.opener.attempt(w, cred)), false)
	}
}

// waitEager waits until every byte of an image is here and proven. A failure leaves
// it lazy, with a line in the log.
func (c *Catalogue) waitEager(ctx context.Context, o *Opened) {
	if layer, err := c.opener.fetchAll(ctx, o); err != nil && ctx.Err() == nil {
		c.log.Error("an eager image is not complete; its pull ends now, and the missing chunks are prefetched",
			"image", o.Ref, "layer", layer, "error", err)
	}
}

// here says whether the image with this manifest is lazy on this node already.
func (c *Catalogue) here(manifest blockdev.Digest) bool {
	list, err := c.records.images()
	if err != nil {
		return false
	}
	for _, img := range list {
		if img.Manifest == manifest && c.hasChain(img.Top) {
			return true
		}
	}
	return false
}

func (c *Catalogue) hasChain(top string) bool {
	chains, err := c.snapshots.Chains(c.tasks.Context())
	_, ok := chains[top]
	return err == nil && ok
}

// impossible notes the image of a failed opening that can never be lazy, since there may
// be no Prepare to say so: containerd unpacks nothing of an artifact, and a volume that it
// makes of one is empty.
func (c *Catalogue) impossible(o *opening, err error) {
	if !errors.Is(err, blockdev.ErrUnsupported) {
		return
	}
	o.explain.Do(func() {
		c.refusals.add(o.ref, CauseUnsupported, err.Error())
		c.log.Warn("image cannot be lazy; containerd unpacks it, or what of it can be unpacked", "image", o.ref, "manifest", o.key.manifest, "error", err)
	})
}

// unused is told of an opening whose result has been given up.
func (c *Catalogue) unused(ctx context.Context, o *opening) {
	if !o.claimed && o.image != nil && !c.hasChain(o.image.Top) {
		c.rights.disclaim(o.key.name)
	}
	c.sweep(ctx)
}

// SourceCredential is what the sources of an image's bytes are asked with that is
// on this node already: what it was pulled with, and else the node's own. It opens
// nothing new.
func (c *Catalogue) SourceCredential(ctx context.Context, ref string) (image.Credential, error) {
	return c.rights.source(ctx, ref)
}

// forgetKeys drops, now and then, the credentials of repositories none of whose
// images still needs a source.
func (c *Catalogue) forgetKeys(ctx context.Context) {
	tick := time.NewTicker(sweepKeys)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := c.dropKeys(); err != nil {
			c.log.Error("cannot find out which credentials are still needed; all are kept", "error", err)
		}
	}
}

func (c *Catalogue) dropKeys() error {
	list, err := c.records.images()
	if err != nil {
		return err
	}
	needed := make(map[string]struct{})
	for _, img := range list {
		w, err := NewWant(img.Ref, img.Manifest)
		if err != nil {
			continue
		}
		for _, id := range img.diffs() {
			if !c.cfg.Data.Has(id) || c.cfg.Data.Incomplete(id) {
				needed[w.Name] = struct{}{}
				break
			}
		}
	}
	c.rights.dropKeys(needed)
	return nil
}
