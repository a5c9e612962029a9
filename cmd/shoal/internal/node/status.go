package node

import (
	"context"
	"fmt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// Status implements control.Daemon.
func (d *Daemon) Status(ctx context.Context) (*control.Status, error) {
	list, err := d.images.Images(ctx)
	if err != nil {
		return nil, err
	}
	users, err := d.vols.LazyUsers()
	if err != nil {
		return nil, err
	}
	st := &control.Status{
		Version: d.cfg.Version, Role: "node", Supernodes: d.up.names(), NoSupernode: d.up.away(), Called: d.metrics.Called(),
		Images: []control.Image{},
	}
	for _, im := range list {
		ci := control.Image{Ref: im.Ref, Layers: []control.Layer{}}
		for _, l := range im.Layers {
			cl := d.layer(l.DiffID)
			cl.LazyUsers = users[l.DiffID]
			ci.Layers = append(ci.Layers, cl)
		}
		ci.Sum()
		st.Images = append(st.Images, ci)
	}
	for _, r := range d.images.Refusals() {
		st.NotLazy = append(st.NotLazy, control.NotLazy{Ref: r.Ref, Cause: string(r.Cause), Why: r.Why, At: r.At})
	}
	return st, nil
}

func (d *Daemon) layer(id blockdev.Digest) control.Layer {
	l := control.Layer{DiffID: id.String()}
	s, ok := d.vols.Stat(id)
	if !ok {
		return l
	}
	l.Size, l.Local = s.Total, s.Local
	if s.Local == s.Total && !s.Complete {
		l.Local = max(0, s.Total-1) // not synced yet: all of it is said only when it is
	}
	switch {
	case s.Dir == "":
	case s.Lazy:
		l.Mount = "lazy"
	default:
		l.Mount = "native"
	}
	if s.Proof != cache.Unproven {
		l.Proof = s.Proof.String()
	}
	return l
}

// Reload implements control.Reloader.
func (d *Daemon) Reload() (*control.Reloaded, error) { return d.reload.Reload() }

// Prefetch implements control.Daemon.
func (d *Daemon) Prefetch(ctx context.Context, req control.PrefetchRequest, event func(control.Event)) error {
	ref, err := daemon.Normalize(req.Ref)
	if err != nil {
		return err
	}
	if !req.Local {
		return d.warm(ctx, ref, req.Credential, event)
	}
	im, err := d.keep(ctx, ref, req.Credential)
	if err != nil {
		return err
	}
	release, err := d.images.Pin(ctx, im)
	if err != nil {
		return err
	}
	defer release()
	for _, l := range im.Layers {
		report := func(local, total int64) {
			stage := "fetching"
			if local == total {
				stage = "proving"
			}
			event(control.Event{Layer: l.Digest.String(), Stage: stage, Done: local, Total: total})
		}
		if err := d.vols.PrefetchWait(ctx, l.DiffID, report); err != nil {
			return fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		s, _ := d.vols.Stat(l.DiffID)
		event(control.Event{Layer: l.Digest.String(), Stage: "verified", Done: s.Total, Total: s.Total})
	}
	return nil
}

// keep opens an image on the word of a credential; the zero one is the node's own.
func (d *Daemon) keep(ctx context.Context, ref string, cred image.Credential) (images.Image, error) {
	if cred == (image.Credential{}) {
		return d.images.Keep(ctx, ref, blockdev.Digest{})
	}
	return d.images.KeepAs(ctx, ref, blockdev.Digest{}, cred)
}

// warm has the supernode fetch an image on the word of a credential; the zero one is the
// node's own.
func (d *Daemon) warm(ctx context.Context, ref string, cred image.Credential, event func(control.Event)) (err error) {
	if cred == (image.Credential{}) {
		if cred, err = d.keychain.Credential(ctx, ref); err != nil {
			return err
		}
	}
	im, err := d.up.source.FetchIndexes(ctx, image.Request{Ref: ref, Platform: daemon.Platform(), Credential: cred, Progress: control.LayerEvents(event)})
	if err != nil {
		return d.keychain.Explain(err)
	}
	for _, l := range im.Layers { // also those that were stored before anything was said
		event(control.Event{Layer: l.Digest.String(), Stage: string(image.StageStored), Done: l.Size, Total: l.Size})
	}
	return nil
}
