package super

import (
	"context"
	"errors"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/internal/image"
)

// Status implements control.Daemon.
func (d *Daemon) Status(context.Context) (*control.Status, error) {
	st := &control.Status{Version: d.cfg.Version, Role: "supernode", Images: []control.Image{}}
	for _, im := range d.super.Stock().Images() {
		ci := control.Image{Ref: im.Ref, Layers: []control.Layer{}}
		for _, l := range im.Layers {
			ci.Layers = append(ci.Layers, control.Layer{DiffID: l.DiffID.String(), Size: l.Size, Local: l.Size})
		}
		ci.Sum()
		st.Images = append(st.Images, ci)
	}
	return st, nil
}

// Members implements control.MemberList.
func (d *Daemon) Members() []control.Member {
	list := []control.Member{}
	for _, m := range d.list.Members() {
		c := control.Member{ID: m.ID, Address: m.Address, Announced: m.Announced, Zone: m.Zone, Rack: m.Rack, MaxUpload: m.MaxUpload,
			Images: m.Images, Seconds: m.Seconds, State: "member"}
		switch {
		case m.Revoked:
			c.State = "revoked"
		case m.Lost:
			c.State = "lost"
		}
		list = append(list, c)
	}
	return list
}

// Revoke implements control.MemberList.
func (d *Daemon) Revoke(id string) error { return d.list.Revoke(id) }

// Allow implements control.MemberList.
func (d *Daemon) Allow(id string) error { return d.list.Allow(id) }

// Prefetch implements control.Daemon: the image is fetched as when a node asks for it.
func (d *Daemon) Prefetch(ctx context.Context, req control.PrefetchRequest, event func(control.Event)) error {
	if req.Local {
		return errors.New("--local brings an image to a node, and this is a supernode: run the command where a node runs, or leave --local out")
	}
	image, err := d.image(ctx, req.Ref, req.Credential)
	if err != nil {
		return err
	}
	image.Progress = control.LayerEvents(event)
	_, err = d.super.FetchIndexes(ctx, image)
	return d.credentials.Explain(err)
}

// Reload implements control.Reloader.
func (d *Daemon) Reload() (*control.Reloaded, error) { return d.reload.Reload() }

// Stored implements control.StoreKeeper.
func (d *Daemon) Stored() []control.StoredLayer {
	out := []control.StoredLayer{}
	for _, l := range d.super.Stock().Layers() {
		out = append(out, control.StoredLayer{Layer: l.Layer.String(), DiffID: l.DiffID.String(), Size: l.Size, Used: l.Used,
			Pinned: l.Pinned, Images: append([]string{}, l.Images...), Origins: append([]string{}, l.Origins...)})
	}
	return out
}

// image is what an operator names, and a credential for it; the zero one is the
// supernode's own.
func (d *Daemon) image(ctx context.Context, name string, cred image.Credential) (image.Request, error) {
	ref, err := daemon.Normalize(name)
	if err != nil {
		return image.Request{}, err
	}
	if cred == (image.Credential{}) {
		cred, err = d.credentials.Credential(ctx, ref)
	}
	return image.Request{Ref: ref, Credential: cred, Platform: daemon.Platform()}, err
}

// Remove implements control.StoreKeeper.
func (d *Daemon) Remove(ctx context.Context, what string) ([]string, error) {
	var gone []blockdev.Digest
	digest, err := blockdev.ParseDigest(what)
	if err == nil {
		gone, err = d.super.Stock().RemoveDigest(digest)
	} else {
		var req image.Request
		if req, err = d.image(ctx, what, image.Credential{}); err == nil {
			gone, err = d.super.Stock().Remove(ctx, req)
		}
	}
	layers := []string{}
	for _, l := range gone {
		layers = append(layers, l.String())
	}
	return layers, err
}

// Pin implements control.StoreKeeper.
func (d *Daemon) Pin(ctx context.Context, name string) error {
	req, err := d.image(ctx, name, image.Credential{})
	if err != nil {
		return err
	}
	return d.super.Stock().Pin(ctx, req)
}

// Unpin implements control.StoreKeeper.
func (d *Daemon) Unpin(name string) error {
	ref, err := daemon.Normalize(name)
	if err != nil {
		return err
	}
	return d.super.Stock().Unpin(ref)
}
