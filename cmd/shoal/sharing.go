package main

import (
	"context"
	"errors"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/swarm"
)

// remote is supernodes on other machines, and before them the nodes of this one's
// groups.
type remote struct {
	*links
	swarm    *swarm.Swarm
	download *pace.Pacer // from others
	upload   *pace.Pacer // to other nodes
}

// keepFrames is how many bytes of compressed chunks a node keeps in memory to pass
// them on. Nodes that fetch an image together are a few megabytes apart.
const keepFrames = 16 << 20

// intake is what all that a node gets from others goes through.
type intake struct {
	window   *exchange.LinkWindow
	download *pace.Pacer
	frames   *exchange.Frames // nil: this node passes nothing on
}

func newIntake(c *config.Node) intake {
	in := intake{window: exchange.NewLinkWindow(), download: pace.New(int64(c.MaxDownload))}
	if len(c.Listen) > 0 {
		in.frames = exchange.NewFrames(keepFrames)
	}
	return in
}

// newRemote puts the swarm before the supernodes.
func newRemote(c *config.Node, up *links, in intake, log *slog.Logger, reg prometheus.Registerer) (*remote, error) {
	m := up.membership
	cfg := swarm.Config{
		Host: m.host, Groups: m.node, Supernode: up, Zone: c.Zone, Rack: c.Rack,
		Window: in.window, Download: in.download, Frames: in.frames, Log: log, Registerer: reg,
	}
	if len(c.Listen) > 0 {
		cfg.Enter = m.enter
	}
	s, err := swarm.New(cfg)
	if err != nil {
		return nil, err
	}
	return &remote{up, s, in.download, pace.New(int64(c.MaxUpload))}, nil
}

// Fetch implements blockdev.Source.
func (r *remote) Fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	return r.swarm.Fetch(ctx, req, deliver)
}

// FetchIndexes implements image.Source.
func (r *remote) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	return r.swarm.FetchIndexes(ctx, req)
}

func (r *remote) Close() error {
	return errors.Join(r.swarm.Close(), r.links.Close(), r.membership.close())
}

// share serves other nodes out of store, if there are any and the config wants it.
// The result ends that.
func share(c *config.Node, up upstream, store swarm.Store, log *slog.Logger, reg prometheus.Registerer) (func() error, error) {
	r, ok := up.(*remote)
	if !ok || len(c.Listen) == 0 {
		return func() error { return nil }, nil
	}
	server, err := exchange.NewServer(r.membership.host, exchange.ServerConfig{
		Provider: r.swarm.Provider(store), Images: r.swarm.Images(store), Limits: swarm.NodeLimits(),
		Upload: r.upload, Log: log, Registerer: reg,
	})
	if err != nil {
		return nil, err
	}
	return server.Close, nil
}
