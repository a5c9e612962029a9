package main

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/control"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/snapshotter/credentials"
	"github.com/shoalfs/shoal/supernode"
	"github.com/shoalfs/shoal/supernode/registry"
)

func newSupernodeCommand() *cobra.Command {
	path := supernodeConfigPath
	cmd := &cobra.Command{
		Use:   "supernode",
		Short: "Run the datacenter's cache, the only one that talks to registries",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := config.DefaultSupernode()
			if err := loadConfig(cmd, path, c); err != nil {
				return err
			}
			return runSupernode(cmd.Context(), c)
		},
	}
	cmd.Flags().StringVar(&path, "config", path, "config file; the default one may be missing")
	return cmd
}

// openSupernode opens what a supernode is, for a daemon of its own or inside a node.
func openSupernode(root string, store config.Store, reg config.Registry, log *slog.Logger, metrics prometheus.Registerer) (*supernode.Supernode, error) {
	var hostDirs []string
	if reg.ConfigPath != "" {
		hostDirs = append(hostDirs, reg.ConfigPath)
	}
	return supernode.New(supernode.Config{
		Dir: root, Quota: int64(store.Quota),
		HostDirs: hostDirs, TrustedRegistries: reg.Trusted,
		AccessTTL: time.Duration(reg.AccessTTL), AccessGrace: time.Duration(reg.AccessGrace),
		Registry: registry.Config{TagTTL: time.Duration(reg.TagTTL)},
		Log:      log, Registerer: metrics,
	})
}

func runSupernode(ctx context.Context, c *config.Supernode) (err error) {
	log := newLogger(c.Log)
	metrics := daemon.NewMetrics(version, "supernode")
	stopTracing, err := daemon.Trace(ctx, "shoal-supernode", version)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopTracing()) }()
	s, err := openSupernode(c.Root, c.Store, c.Registry, log, metrics)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	key, err := host.LoadIdentity(filepath.Join(c.Root, "identity"))
	if err != nil {
		return err
	}
	h, err := host.New(host.Config{Key: key, Listen: c.Listen, UserAgent: "shoal/" + version})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	server, err := exchange.NewServer(h, exchange.ServerConfig{Chunks: s, Images: s, Documents: s, Log: log, Registerer: metrics})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return control.Serve(ctx, c.ControlAddress, &supernodeDaemon{s, credentials.NewDockerConfig(ctx, "", log)})
	})
	g.Go(func() error { return daemon.ServeMetrics(ctx, c.MetricsAddress, metrics, s.Healthy) })
	for _, addr := range host.Addrs(h) {
		log.Info("supernode is up: name this address in the nodes' config", "version", version, "supernodes", addr)
	}
	return g.Wait()
}

// supernodeDaemon answers the control socket.
type supernodeDaemon struct {
	s           *supernode.Supernode
	credentials *credentials.DockerConfig
}

func (d *supernodeDaemon) Status(context.Context) (*control.Status, error) {
	st := &control.Status{Version: version, Role: "supernode", Images: []control.Image{}}
	for _, im := range d.s.Images() {
		ci := control.Image{Ref: im.Ref, Layers: []control.Layer{}}
		for _, l := range im.Layers {
			ci.Layers = append(ci.Layers, control.Layer{DiffID: l.DiffID.String(), Size: l.Size, Local: l.Size})
		}
		st.Images = append(st.Images, ci)
	}
	return st, nil
}

func (d *supernodeDaemon) Prefetch(ctx context.Context, req control.PrefetchRequest, event func(control.Event)) error {
	if req.Local {
		return errors.New("--local brings an image to a node, and this is a supernode: run it where a node runs, or leave --local out")
	}
	ref, err := normalize(req.Ref)
	if err != nil {
		return err
	}
	cred, err := d.credentials.Credential(ctx, ref)
	if err != nil {
		return err
	}
	_, err = d.s.OpenImage(ctx, blockdev.ImageRequest{Ref: ref, Credential: cred, Platform: platform(), Progress: layerEvents(event)})
	return d.credentials.Explain(err)
}

// layerEvents makes a layer's progress an event of the control socket.
func layerEvents(event func(control.Event)) func(blockdev.Progress) {
	return func(p blockdev.Progress) {
		event(control.Event{Layer: p.Layer.String(), Stage: string(p.Stage), Done: p.Done, Total: p.Total})
	}
}
