package node

import (
	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// State implements control.Stateful.
func (d *Daemon) State(after uint64) control.State {
	st := control.State{Version: d.cfg.Version, NoSupernode: d.up.away(), Called: d.metrics.Called()}
	st.Notices, st.Last = d.notices.After(after, d.refs)
	return st
}

// refs returns the images that have a diff.
func (d *Daemon) refs(diff blockdev.Digest) []string {
	found, err := d.images.Origins(diff)
	if err != nil {
		d.log.Warn("cannot tell which images have a layer", "diff", diff, "error", err)
	}
	refs := []string{}
	for _, o := range found {
		refs = append(refs, o.Ref)
	}
	return refs
}

// away says why no supernode serves this node now; empty: one does.
func (u *upstream) away() string {
	err := u.ready()
	if err == nil && u.first.Status != nil {
		err = u.first.Status()
	}
	if err == nil {
		return ""
	}
	return err.Error()
}

// pulled, distrusted and readFailed have users of an image learn what has happened to it.
func (d *Daemon) pulled(ref string, why *images.Refusal) {
	if why == nil {
		d.notices.Image(control.Lazy, ref, "", "")
		return
	}
	d.notices.Image(control.Unpacked, ref, string(why.Cause), why.Why)
}

func (d *Daemon) distrusted(diff blockdev.Digest, why error) {
	d.notices.Layer(control.Quarantined, diff, why)
}

func (d *Daemon) readFailed(diff blockdev.Digest, why error) {
	d.notices.Layer(control.ReadFailed, diff, why)
}
