package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/volume"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/cmd/shoal/internal/fdstore"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node/metrics"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node/notices"
	"github.com/shoalfs/shoal/cmd/shoal/internal/reload"
	"github.com/shoalfs/shoal/internal/control"
	"github.com/shoalfs/shoal/internal/registry/credentials"
	"github.com/shoalfs/shoal/internal/tasks"
	"github.com/shoalfs/shoal/snapshotter"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// Config is what Open needs; all of it is required.
type Config struct {
	*config.Node
	// Load reads the config file again.
	Load func() (*config.Node, error)
	// Store keeps descriptors for the next process.
	Store *fdstore.Store
	Log   *slog.Logger
	// Level is the one of Log.
	Level   *slog.LevelVar
	Version string
}

// Daemon is a node that runs.
type Daemon struct {
	cfg      Config
	log      *slog.Logger
	reload   *reload.Reloader[*config.Node]
	metrics  *metrics.Metrics
	registry *prometheus.Registry
	ports    *daemon.Ports
	state    *daemon.State
	keychain *credentials.DockerConfig
	vols     *volume.Manager
	up       upstream
	images   *images.Catalogue
	sn       *snapshotter.Snapshotter
	notices  *notices.Notices
	// mirror answers at mirror_address, on what listenMirror returns.
	mirror       http.Handler
	listenMirror func() (net.Listener, error)
	closers      tasks.Closers
}

// Open makes all parts of a node; the package comment says in which order. Containers
// read from then on. Close it, also if Serve has ended.
func Open(ctx context.Context, cfg Config) (*Daemon, error) {
	d := &Daemon{cfg: cfg, log: cfg.Log, metrics: metrics.New(), notices: notices.New()}
	d.reload = reload.New(cfg.Node, cfg.Load, d.log)
	for _, open := range []func(context.Context) error{
		d.openVolumes, d.openPorts, d.openUpstream, d.openImages, d.attach, d.openSnapshotter, d.openMirror, d.count,
	} {
		if err := open(ctx); err != nil {
			return nil, errors.Join(err, d.Close())
		}
	}
	return d, nil
}

// openVolumes serves FUSE.
func (d *Daemon) openVolumes(ctx context.Context) (err error) {
	daemon.LimitMemory(d.log)
	if !d.cfg.Store.Kept() {
		d.log.Warn("no descriptor store holds this process's descriptors: if the process ends, containers on lazy mounts get I/O errors; start it with `shoal keep -- shoal node`, or with the systemd unit that comes with shoal")
	}
	if err := os.MkdirAll(d.cfg.Root, 0o700); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	scrub := time.Duration(d.cfg.ScrubInterval)
	if scrub == 0 {
		scrub = -1
	}
	d.vols, err = volume.Open(ctx, volume.Config{
		Root: d.cfg.Root, Log: d.log, Keep: d.cfg.Store, Observe: d.metrics.Read, ReadFailed: d.readFailed,
		ReadTimeout: time.Duration(d.cfg.ReadTimeout), ScrubInterval: scrub, Loop: d.cfg.Mount == config.MountLoop,
		Cache: cache.Config{
			Timeout:      time.Duration(d.cfg.ReadTimeout),
			PrefetchRate: int64(d.cfg.PrefetchRate),
			Quota:        int64(d.cfg.CacheQuota),
			Distrusted:   d.distrusted,
		},
	})
	if err != nil {
		return err
	}
	d.closers.Add(d.vols.Close)
	return nil
}

// openPorts says on metrics_address how far the node is.
func (d *Daemon) openPorts(ctx context.Context) error {
	d.registry = daemon.NewMetrics(d.cfg.Version, "node")
	stopTracing, err := daemon.Trace(ctx, "shoal-node", d.cfg.Version)
	if err != nil {
		return err
	}
	d.closers.Add(stopTracing)
	if d.ports, err = daemon.NewPorts(d.log, d.registry); err != nil {
		return err
	}
	d.state = daemon.Starting("the node is starting")
	stop := d.ports.Serve(ctx, "metrics_address", d.cfg.MetricsAddress, daemon.Metrics(d.registry, d.state))
	d.closers.Add(func() error { stop(); return nil })
	return nil
}

// count registers the metrics of all parts that do not do so themselves.
func (d *Daemon) count(context.Context) error {
	return d.metrics.Register(d.registry, d.vols, d.images)
}

func (d *Daemon) openImages(ctx context.Context) error {
	policy, err := d.cfg.Policy()
	if err != nil {
		return err
	}
	d.keychain = credentials.NewDockerConfig(ctx, d.cfg.DockerConfig, d.log)
	d.images, err = images.Open(images.Config{
		Root: d.cfg.Root, Data: d.vols, Images: d.up.source, Groups: d.up.groups, Policy: policy,
		Credentials: d.keychain, NodeCredentials: d.cfg.NodeCredentialsForPulls, Remote: elsewhere(d.cfg.Node), Platform: daemon.Platform(),
		PrefetchAfterPull: d.cfg.PrefetchAfterPull, PrefetchAfterExit: d.cfg.PrefetchAfterExit,
		IndexTimeout: time.Duration(d.cfg.IndexTimeout), Pulled: d.pulled, Log: d.log,
	})
	if err != nil {
		return err
	}
	d.closers.Add(d.images.Close)
	d.reload.On(func(c *config.Node) error { d.cfg.Level.Set(c.Log.Level); return nil }, "log.level")
	d.reload.On(func(c *config.Node) error {
		policy, err := c.Policy()
		if err == nil {
			d.images.SetPolicy(policy)
		}
		return err
	}, "images.lazy", "images.never", "images.eager", "images.prefetch", "prefetch")
	d.reload.On(func(c *config.Node) error { d.vols.SetPrefetchRate(int64(c.PrefetchRate)); return nil }, "prefetch_rate")
	return nil
}

func (d *Daemon) openSnapshotter(context.Context) (err error) {
	d.sn, err = snapshotter.New(snapshotter.Config{Root: d.cfg.Root, Images: d.images, PrepareTimeout: time.Duration(d.cfg.PrepareTimeout), Log: d.log})
	if err != nil {
		return err
	}
	d.closers.Add(d.sn.Close)
	return nil
}

// Serve answers containerd and commands on this machine until ctx ends.
func (d *Daemon) Serve(ctx context.Context) error {
	store := d.cfg.Store
	server := grpc.NewServer(append(newOnlyOne(d.log).options(), daemon.TraceGRPC(), d.metrics.Calls())...)
	snapshotter.Register(server, d.sn)
	ln, err := listenKept(store, keptContainerd, unixSocket(d.cfg.Address), d.log)
	if err != nil {
		return err
	}
	controlLn, err := listenKept(store, keptControl, unixSocket(d.cfg.ControlAddress), d.log)
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	// What fails here must not take away what containers read from.
	var beside sync.WaitGroup
	defer beside.Wait()
	g, ctx := errgroup.WithContext(ctx)
	if d.cfg.MirrorAddress != "" {
		port := d.ports.Open("mirror_address", d.cfg.MirrorAddress, d.listenMirror)
		beside.Go(func() { port.ServeHTTP(ctx, d.mirror) })
	}
	if err := store.DropRest(); err != nil {
		d.log.Error("cannot drop descriptors that another version stored", "error", err)
	}
	g.Go(func() error { return server.Serve(ln) })
	g.Go(func() error {
		<-ctx.Done()
		err := store.Stopping()
		daemon.StopGRPC(server)
		return err
	})
	g.Go(func() error { return control.ServeOn(ctx, controlLn, d) })
	beside.Go(func() { d.reload.Serve(ctx) })
	beside.Go(func() {
		if err := store.Watch(ctx, d.vols.Check); err != nil {
			d.log.Error("cannot report that the node is alive; systemd or shoal keep may end it", "error", err)
		}
	})
	d.state.Set(nil, func() error {
		if err := ctx.Err(); err != nil {
			return errors.New("the node is stopping")
		}
		return d.up.ready()
	})
	d.log.Info("node is up", "version", d.cfg.Version, "socket", d.cfg.Address, "supernodes", d.up.names())
	if err := store.Ready(); err != nil {
		d.log.Error("cannot report that the node is ready", "error", err)
	}
	return g.Wait()
}

// Close ends all of it, FUSE last.
func (d *Daemon) Close() error { return d.closers.Close() }
