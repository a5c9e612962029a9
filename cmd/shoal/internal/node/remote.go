package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"sync"

	libp2phost "github.com/libp2p/go-libp2p/core/host"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/chain"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/members"
	"github.com/shoalfs/shoal/p2p/swarm"
)

// keepFrames is how many bytes of compressed chunks a node keeps in memory to pass
// them on. Nodes that fetch an image together are a few megabytes apart.
const keepFrames = 16 << 20

// openRemote joins the supernodes in the config and the nodes of this one's groups, and
// serves these if the config wants it.
func (d *Daemon) openRemote(ctx context.Context) error {
	h, node, err := d.join(ctx)
	if err != nil {
		return err
	}
	in := exchange.Intake{Window: exchange.NewLinkWindow(), Download: pace.New(int64(d.cfg.MaxDownload))}
	upload := pace.New(int64(d.cfg.MaxUpload))
	cfg := swarm.Config{Host: h, Groups: node, Zone: d.cfg.Zone, Rack: d.cfg.Rack, Log: d.log, Registerer: d.registry}
	shares := len(d.cfg.Listen) > 0
	if shares {
		in.Frames = exchange.NewFrames(keepFrames)
		cfg.Enter = node.Enter
	}
	up, err := openLinks(d.cfg.Node, h, node, exchange.Options{Intake: in, Away: patience(d.cfg.Node), Log: d.log})
	if err != nil {
		return err
	}
	d.closers.Add(up.Close)
	cfg.Supernode, cfg.Intake = up.Uplink, in
	s, err := swarm.New(cfg)
	if err != nil {
		return err
	}
	d.closers.Add(s.Close)
	node.Watch(func(diff blockdev.Digest) bool {
		stat, ok := d.vols.Stat(diff)
		return ok && stat.Complete
	})
	if shares {
		server, err := exchange.NewServer(h, exchange.ServerConfig{
			Provider: s.Provider(d.vols), Images: s.Images(d.vols), Limits: swarm.NodeLimits(),
			Upload: upload, Log: d.log, Registerer: d.registry,
		})
		if err != nil {
			return err
		}
		d.closers.Add(server.Close)
	}
	d.up = upstream{
		source: s,
		first: chain.Step{
			Name: "supernode", Source: s, From: blockdev.FromLocal, // it tells peers and supernodes apart
			Patience: patience(d.cfg.Node), Away: func() bool { return up.Away(patience(d.cfg.Node)) }, Status: up.Status,
		},
		inflight: s.Inflight,
		groups:   node,
		names:    func() []string { return *up.names.Load() },
		ready:    node.Answered,
		check:    func(context.Context, *control.CheckReport, func(string)) error { return nil },
	}
	reloadSupernodes(d.reload, up, elsewhere(d.cfg.Node))
	d.reload.On(func(c *config.Node) error { in.Download.Set(int64(c.MaxDownload)); return nil }, "max_download")
	d.reload.On(func(c *config.Node) error { upload.Set(int64(c.MaxUpload)); return nil }, "max_upload")
	return nil
}

// join makes a node's host, and a member of the supernodes in its config.
func (d *Daemon) join(ctx context.Context) (libp2phost.Host, *members.Node, error) {
	// A token that is missing now is no reason not to serve what is here: it is
	// looked for again, and the log says so.
	token := func() (string, error) {
		list, err := members.ReadTokens(d.cfg.TokenFile)
		if errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("token_file: %w: copy the supernode's token there (its log names the file)", err)
		}
		if err != nil {
			return "", fmt.Errorf("token_file: %w", err)
		}
		return list[0], nil
	}
	supernodes, err := parseSupernodes(d.cfg.Supernodes)
	if err != nil {
		return nil, nil, err
	}
	key, err := host.LoadIdentity(filepath.Join(d.cfg.Root, "identity"))
	if err != nil {
		return nil, nil, err
	}
	announce, err := d.cfg.Announced()
	if err != nil {
		return nil, nil, err
	}
	node, err := members.New(members.Config{
		Announce: announce, Supernodes: supernodes, Token: token,
		Zone: d.cfg.Zone, Rack: d.cfg.Rack, MaxUpload: int64(d.cfg.MaxUpload), Log: d.log, Registerer: d.registry,
	})
	if err != nil {
		return nil, nil, err
	}
	h, err := host.New(host.Config{Key: key, Guard: node, UserAgent: "shoal/" + d.cfg.Version})
	if err != nil {
		return nil, nil, errors.Join(err, node.Close())
	}
	d.closers.Add(h.Close)
	d.closers.Add(node.Close)
	// Before it joins, which is when others are told of its addresses.
	d.listen(ctx, h)
	return h, node, node.Start(h)
}

// listen has the host listen for other nodes, now or as soon as it can.
func (d *Daemon) listen(ctx context.Context, h libp2phost.Host) {
	ctx, stop := context.WithCancel(ctx)
	var listening sync.WaitGroup
	for _, addr := range d.cfg.Listen {
		port := d.ports.Open("listen", addr, func() (net.Listener, error) { return nil, host.Listen(h, addr) })
		listening.Go(func() { _, _ = port.Listener(ctx) })
	}
	d.closers.Add(func() error {
		stop()
		listening.Wait()
		return nil
	})
}
