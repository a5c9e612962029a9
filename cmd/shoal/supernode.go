package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/control"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/credentials"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/roster"
	"github.com/shoalfs/shoal/supernode"
	"github.com/shoalfs/shoal/supernode/layers"
)

func newSupernodeCommand() *cobra.Command {
	path := supernodeConfigPath
	cmd := &cobra.Command{
		Use:   "supernode",
		Short: "Run the datacenter's cache, the only one that talks to registries",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			load := func() (*config.Supernode, error) {
				c := config.DefaultSupernode()
				return c, loadConfig(cmd, path, c)
			}
			c, err := load()
			if err != nil {
				return err
			}
			return runSupernode(cmd.Context(), c, load)
		},
	}
	cmd.Flags().StringVar(&path, "config", path, "config file; the default one may be missing")
	return cmd
}

// openSupernode opens what a supernode is, for a daemon of its own or inside a node.
// The place is empty for the latter.
func openSupernode(root string, store config.Store, reg config.Registry, at place, log *slog.Logger, metrics prometheus.Registerer) (*supernode.Supernode, error) {
	var hostDirs []string
	if reg.ConfigPath != "" {
		hostDirs = append(hostDirs, reg.ConfigPath)
	}
	allowed, err := reg.Repositories()
	if err != nil {
		return nil, err
	}
	return supernode.New(supernode.Config{
		Allowed: allowed,
		Dir:     root, Quota: int64(store.Quota),
		HostDirs: hostDirs, TrustedRegistries: reg.Trusted,
		AccessTTL: time.Duration(reg.AccessTTL), AccessGrace: time.Duration(reg.AccessGrace),
		Ingests:  reg.Ingests,
		Registry: registry.Config{TagTTL: time.Duration(reg.TagTTL), Download: pace.New(int64(reg.MaxDownload))},
		Grant:    at.grant, Holders: at.holders, Relays: at.relays, Self: at.self, Log: log, Registerer: metrics,
	})
}

// reloadRegistry adds what a supernode does when keys of its registry section change.
func reloadRegistry[C any](reload *reloader[C], prefix string, s *supernode.Supernode, section func(C) config.Registry) {
	reload.on(func(c C) error {
		list, err := section(c).Repositories()
		if err == nil {
			s.Allow(list)
		}
		return err
	}, prefix+"registry.allowed")
	reload.on(func(c C) error { s.LimitDownload(int64(section(c).MaxDownload)); return nil }, prefix+"registry.max_download")
}

// place is where a supernode is among others.
type place struct {
	grant   func(peer string, manifest blockdev.Digest, origin string) ([]byte, error)
	holders func(manifest blockdev.Digest, origin string, n int) []layers.Holder
	relays  func(ctx context.Context, peer string, manifest blockdev.Digest) []image.Relay
	self    peer.ID
}

// supernodeLimits has requests wait for the upload budget: a node that is refused asks
// the registry, if there is one supernode. The waits are shorter than what a node has
// patience for (supernodePatience; exchange.Options.PrefetchTimeout).
func supernodeLimits() exchange.Limits {
	return exchange.Limits{DemandBacklog: supernodePatience * 8 / 10, PrefetchBacklog: 30 * time.Second}
}

func runSupernode(ctx context.Context, c *config.Supernode, load func() (*config.Supernode, error)) (err error) {
	log, level := newLeveledLogger(c.Log)
	reload := newReloader(c, load, log)
	daemon.LimitMemory(log)
	metrics := daemon.NewMetrics(version, "supernode")
	ports, err := daemon.NewPorts(log, metrics)
	if err != nil {
		return err
	}
	state := daemon.Starting("the supernode is starting: it opens its store")
	defer ports.Serve(ctx, "metrics_address", c.MetricsAddress, daemon.Metrics(metrics, state))()
	stopTracing, err := daemon.Trace(ctx, "shoal-supernode", version)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopTracing()) }()
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	key, err := host.LoadIdentity(filepath.Join(c.Root, "identity"))
	if err != nil {
		return err
	}
	self, err := host.ID(key)
	if err != nil {
		return err
	}
	others, err := parseSiblings(c.Siblings, self)
	if err != nil {
		return err
	}
	list, err := roster.New(roster.Config{
		Dir: c.Root, TokenFile: c.TokenFile, Key: key, Siblings: peerIDs(others), Log: log, Registerer: metrics,
	})
	if err != nil {
		return err
	}
	h, err := host.New(host.Config{Key: key, MaxPeers: c.MaxPeers, Guard: list, UserAgent: "shoal/" + version})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	sibs := newSiblings(h, log)
	defer func() { err = errors.Join(err, sibs.close()) }()
	s, err := openSupernode(c.Root, c.Store, c.Registry, place{list.Grant, holders{h, list, log}.of, list.Relays, self}, log, metrics)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := sibs.change(others, s.SetSiblings); err != nil {
		return err
	}
	list.Start(h)
	defer func() { err = errors.Join(err, list.Close()) }()
	upload := pace.New(int64(c.MaxUpload))
	server, err := exchange.NewServer(h, exchange.ServerConfig{
		Chunks: s, Images: s, Documents: s, Profiles: s, Upload: upload, Limits: supernodeLimits(),
		Log: log, Registerer: metrics,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	// Last: who can connect may ask. A node that is refused knows what that is, and waits.
	for _, addr := range c.Listen {
		if err := host.Listen(h, addr); err != nil {
			return err
		}
	}
	reload.on(func(c *config.Supernode) error { return setLevel(level, c.Log.Level) }, "log.level")
	reload.on(func(c *config.Supernode) error { upload.Set(int64(c.MaxUpload)); return nil }, "max_upload")
	reloadRegistry(reload, "", s, func(c *config.Supernode) config.Registry { return c.Registry })
	reloadSiblings(reload, self, sibs, list, s)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { reload.serve(ctx); return nil })
	g.Go(func() error {
		return control.Serve(ctx, c.ControlAddress, &supernodeDaemon{reload, s, list, credentials.NewDockerConfig(ctx, "", log)})
	})
	state.Set(s.Healthy, func() error {
		if ctx.Err() != nil {
			return errors.New("the supernode is stopping")
		}
		return nil
	})
	log.Info("nodes join with a token in this file; copy the token to their token_file", "path", list.TokenFile())
	for _, addr := range host.Addrs(h) {
		log.Info("supernode is up; name this address in the nodes' config", "version", version, "supernodes", addr)
	}
	return g.Wait()
}

// supernodeDaemon answers the control socket.
type supernodeDaemon struct {
	*reloader[*config.Supernode]
	s           *supernode.Supernode
	list        *roster.List
	credentials *credentials.DockerConfig
}

func (d *supernodeDaemon) Status(context.Context) (*control.Status, error) {
	st := &control.Status{Version: version, Role: "supernode", Images: []control.Image{}}
	for _, im := range d.s.Stock().Images() {
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
func (d *supernodeDaemon) Members() []control.Member {
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
func (d *supernodeDaemon) Revoke(id string) error { return d.list.Revoke(id) }

// Allow implements control.MemberList.
func (d *supernodeDaemon) Allow(id string) error { return d.list.Allow(id) }

func (d *supernodeDaemon) Prefetch(ctx context.Context, req control.PrefetchRequest, event func(control.Event)) error {
	if req.Local {
		return errors.New("--local brings an image to a node, and this is a supernode: run the command where a node runs, or leave --local out")
	}
	ref, err := normalize(req.Ref)
	if err != nil {
		return err
	}
	cred, err := d.credentials.Credential(ctx, ref)
	if err != nil {
		return err
	}
	_, err = d.s.FetchIndexes(ctx, image.Request{Ref: ref, Credential: cred, Platform: platform(), Progress: layerEvents(event)})
	return d.credentials.Explain(err)
}

// layerEvents makes a layer's progress an event of the control socket.
func layerEvents(event func(control.Event)) func(image.Progress) {
	return func(p image.Progress) {
		event(control.Event{Layer: p.Layer.String(), Stage: string(p.Stage), Done: p.Done, Total: p.Total})
	}
}
