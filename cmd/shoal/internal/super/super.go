// Package super is the daemon of a supernode: a supernode, and around it what it needs to
// be one of several machines: a host for connections, the list of members, the server that
// nodes ask, and the other supernodes.
package super

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	libp2phost "github.com/libp2p/go-libp2p/core/host"
	"golang.org/x/sync/errgroup"

	"github.com/shoalfs/shoal/blockdev/pace"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/cmd/shoal/internal/reload"
	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/credentials"
	"github.com/shoalfs/shoal/internal/tasks"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/p2p/host"
	"github.com/shoalfs/shoal/p2p/roster"
	"github.com/shoalfs/shoal/supernode"
)

// Config is what Open needs; all of it is required.
type Config struct {
	*config.Supernode
	// Load reads the config file again.
	Load func() (*config.Supernode, error)
	Log  *slog.Logger
	// Level is the one of Log.
	Level   *slog.LevelVar
	Version string
}

// Daemon is a supernode that runs.
type Daemon struct {
	cfg    Config
	log    *slog.Logger
	state  *daemon.State
	host   libp2phost.Host
	list   *roster.List
	super  *supernode.Supernode
	reload *reload.Reloader[*config.Supernode]
	// credentials are those of the user that runs a command on this machine.
	credentials *credentials.DockerConfig
	closers     tasks.Closers
}

// Patience is how long a node waits at most for its supernodes to bring a chunk that
// somebody waits for.
const Patience = 10 * time.Second

// limits has requests wait for the upload budget: a node that is refused asks the
// registry, if there is one supernode. The waits are shorter than what a node has
// patience for (Patience; exchange.Options.PrefetchTimeout).
func limits() exchange.Limits {
	return exchange.Limits{DemandBacklog: Patience * 8 / 10, PrefetchBacklog: 30 * time.Second}
}

// Settings are what sections of a config say of a supernode that lives in dir, in a daemon
// of its own or inside a node.
func Settings(dir string, store config.Store, reg config.Registry) (supernode.Config, error) {
	allowed, err := reg.Repositories()
	c := supernode.Config{
		Dir: dir, Quota: int64(store.Quota), Allowed: allowed, TrustedRegistries: reg.Trusted, Ingests: reg.Ingests,
		AccessTTL: time.Duration(reg.AccessTTL), AccessGrace: time.Duration(reg.AccessGrace),
		Registry: registry.Config{TagTTL: time.Duration(reg.TagTTL), Download: pace.New(int64(reg.MaxDownload))},
	}
	if reg.ConfigPath != "" {
		c.HostDirs = []string{reg.ConfigPath}
	}
	return c, err
}

// Reload adds to r what a supernode does when keys of its registry section change.
func Reload[C any](r *reload.Reloader[C], prefix string, s *supernode.Supernode, section func(C) config.Registry) {
	r.On(func(c C) error {
		list, err := section(c).Repositories()
		if err == nil {
			s.Allow(list)
		}
		return err
	}, prefix+"registry.allowed")
	r.On(func(c C) error { s.LimitDownload(int64(section(c).MaxDownload)); return nil }, prefix+"registry.max_download")
}

// Open makes a supernode and what it needs, in this order: metrics, so that somebody sees
// how far it is; the store and the list of members; the server; and the ports last, since
// each peer that can connect may ask. Close it, also if Serve has ended.
func Open(ctx context.Context, cfg Config) (_ *Daemon, err error) {
	d := &Daemon{cfg: cfg, log: cfg.Log}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	d.reload = reload.New(cfg.Supernode, cfg.Load, d.log)
	daemon.LimitMemory(d.log)
	metrics := daemon.NewMetrics(cfg.Version, "supernode")
	ports, err := daemon.NewPorts(d.log, metrics)
	if err != nil {
		return nil, err
	}
	d.state = daemon.Starting("the supernode is starting: it opens its store")
	stop := ports.Serve(ctx, "metrics_address", cfg.MetricsAddress, daemon.Metrics(metrics, d.state))
	d.closers.Add(func() error { stop(); return nil })
	stopTracing, err := daemon.Trace(ctx, "shoal-supernode", cfg.Version)
	if err != nil {
		return nil, err
	}
	d.closers.Add(stopTracing)
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		return nil, fmt.Errorf("root: %w", err)
	}
	key, err := host.LoadIdentity(filepath.Join(cfg.Root, "identity"))
	if err != nil {
		return nil, err
	}
	self, err := host.ID(key)
	if err != nil {
		return nil, err
	}
	others, err := parseSiblings(cfg.Siblings, self)
	if err != nil {
		return nil, err
	}
	d.list, err = roster.New(roster.Config{
		Dir: cfg.Root, TokenFile: cfg.TokenFile, Key: key, Siblings: peerIDs(others), Log: d.log, Registerer: metrics,
	})
	if err != nil {
		return nil, err
	}
	d.host, err = host.New(host.Config{Key: key, MaxPeers: cfg.MaxPeers, Guard: d.list, UserAgent: "shoal/" + cfg.Version})
	if err != nil {
		return nil, err
	}
	d.closers.Add(d.host.Close)
	sibs := newSiblings(d.host, d.log)
	d.closers.Add(sibs.close)
	settings, err := Settings(cfg.Root, cfg.Store, cfg.Registry)
	if err != nil {
		return nil, err
	}
	settings.Grant, settings.Holders, settings.Relays, settings.Self = d.list.Grant, d.holders, d.list.Relays, self
	settings.Log, settings.Registerer = d.log, metrics
	if d.super, err = supernode.New(settings); err != nil {
		return nil, err
	}
	d.closers.Add(d.super.Close)
	if err := sibs.change(others, d.super.SetSiblings); err != nil {
		return nil, err
	}
	d.list.Start(d.host)
	d.closers.Add(d.list.Close)
	upload := pace.New(int64(cfg.MaxUpload))
	server, err := exchange.NewServer(d.host, exchange.ServerConfig{
		Chunks: d.super, Images: d.super, Documents: d.super, Profiles: d.super, Upload: upload, Limits: limits(),
		Log: d.log, Registerer: metrics,
	})
	if err != nil {
		return nil, err
	}
	d.closers.Add(server.Close)
	// A node that is refused until now knows what that is, and waits.
	for _, addr := range cfg.Listen {
		if err := host.Listen(d.host, addr); err != nil {
			return nil, err
		}
	}
	d.reload.On(func(c *config.Supernode) error { cfg.Level.Set(c.Log.Level); return nil }, "log.level")
	d.reload.On(func(c *config.Supernode) error { upload.Set(int64(c.MaxUpload)); return nil }, "max_upload")
	Reload(d.reload, "", d.super, func(c *config.Supernode) config.Registry { return c.Registry })
	d.reloadSiblings(self, sibs)
	d.credentials = credentials.NewDockerConfig(ctx, "", d.log)
	return d, nil
}

// Serve answers commands on this machine, until ctx ends; nodes are answered since Open.
func (d *Daemon) Serve(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { d.reload.Serve(ctx); return nil })
	g.Go(func() error { return control.Serve(ctx, d.cfg.ControlAddress, d) })
	d.state.Set(d.super.Healthy, func() error {
		if ctx.Err() != nil {
			return errors.New("the supernode is stopping")
		}
		return nil
	})
	d.log.Info("nodes join with a token in this file; copy the token to their token_file", "path", d.list.TokenFile())
	for _, addr := range host.Addrs(d.host) {
		d.log.Info("supernode is up; name this address in the nodes' config", "version", d.cfg.Version, "supernodes", addr)
	}
	return g.Wait()
}

// Close ends all of it.
func (d *Daemon) Close() error { return d.closers.Close() }
