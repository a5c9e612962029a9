package node

import (
	"context"
	"path/filepath"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/chain"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/super"
	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/p2p/swarm"
	"github.com/shoalfs/shoal/snapshotter/images"
	"github.com/shoalfs/shoal/supernode"
)

// upstream is where a node's indexes and missing chunks come from: other machines
// (openRemote), or a supernode in this process (openEmbedded).
type upstream struct {
	source swarm.Supernode // a *swarm.Swarm or *supernode.Supernode
	// first is the source as the first step of a read.
	first chain.Step
	// inflight is volume.Upstream.Inflight.
	inflight func() int64
	// groups is told which images are here; nil: nobody is.
	groups images.Groups
	// names says which the supernodes are.
	names func() []string
	// ready says why none of them has let this node in.
	ready func() error
	// check adds to a report what is stored here beside the volumes.
	check func(ctx context.Context, r *control.CheckReport, event func(string)) error
}

// patience is how long a read waits for the supernodes, and for the nodes before
// them, to bring anything before the registry is asked, whether they are silent or cannot
// be reached. None waits longer than that for supernodes that went away, or that were
// not there when the node started.
func patience(c *config.Node) time.Duration {
	return min(super.Patience, time.Duration(c.ReadTimeout)/5)
}

func (d *Daemon) openUpstream(ctx context.Context) error {
	if len(d.cfg.Supernodes) == 0 {
		return d.openEmbedded()
	}
	return d.openRemote(ctx)
}

func (d *Daemon) openEmbedded() error {
	settings, err := super.Settings(filepath.Join(d.cfg.Root, embeddedDir), d.cfg.Embedded.Store, d.cfg.Embedded.Registry)
	if err != nil {
		return err
	}
	settings.Log, settings.Registerer = d.log, d.registry
	s, err := supernode.New(settings)
	if err != nil {
		return err
	}
	d.closers.Add(s.Close)
	d.up = upstream{
		source: s,
		first:  chain.Step{Name: "supernode", Source: s, From: blockdev.FromSupernode, Patience: patience(d.cfg.Node)},
		names:  func() []string { return []string{"embedded"} },
		ready:  func() error { return nil },
		check: func(ctx context.Context, r *control.CheckReport, event func(string)) error {
			event("store")
			h, err := s.Check(ctx)
			if err != nil {
				return err
			}
			super.AddStore(r, h)
			r.Databases++
			return nil
		},
	}
	super.Reload(d.reload, "embedded.", s, func(c *config.Node) config.Registry { return c.Embedded.Registry })
	return nil
}
