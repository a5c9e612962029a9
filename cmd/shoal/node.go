package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/cache"
	"github.com/shoalfs/shoal/blockdev/volume"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/control"
	"github.com/shoalfs/shoal/cmd/shoal/internal/daemon"
	"github.com/shoalfs/shoal/cmd/shoal/internal/fdstore"
	"github.com/shoalfs/shoal/cmd/shoal/internal/program"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry/credentials"
	"github.com/shoalfs/shoal/p2p/exchange"
	"github.com/shoalfs/shoal/snapshotter"
	"github.com/shoalfs/shoal/snapshotter/images"
	"github.com/shoalfs/shoal/supernode"
)

func newNodeCommand() *cobra.Command {
	path := nodeConfigPath
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Run the daemon of a machine that runs containers",
		Long: `Node is containerd's snapshotter on this machine. It needs root, and in
containerd's config:

  [proxy_plugins.shoal]
    type = "snapshot"
    address = "/run/shoal/shoal.sock"
    capabilities = ["remap-ids"]
    [proxy_plugins.shoal.exports]
      root = "/var/lib/shoal"
      enable_remote_snapshot_annotations = "true"

It is also a registry mirror on loopback: manifests come through the supernode as
well, pulls of images that are new in the datacenter wait there, and private images
are lazy for pulls that have a credential. The file that ca names is made at the first
start. In /etc/containerd/certs.d/_default/hosts.toml:

  [host."https://127.0.0.1:7704"]
    ca = "/var/lib/shoal/mirror-ca.pem"
    capabilities = ["pull", "resolve"]`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			load := func() (*config.Node, error) {
				c := config.DefaultNode()
				return c, loadConfig(cmd, path, c)
			}
			c, err := load()
			if err != nil {
				return err
			}
			if err := program.Detach(); err != nil {
				return err
			}
			program.SetName(cmd.Root().Name())
			return runNode(cmd.Context(), c, load, fdstore.Open())
		},
	}
	cmd.Flags().StringVar(&path, "config", path, "config file; the default one may be missing")
	return cmd
}

// upstream is where a node's indexes and missing chunks come from.
type upstream interface {
	blockdev.Source
	image.Source
	image.DocumentSource
	blockdev.ProfileSink
	Close() error
}

// explained says in an error that a registry denies access if that may be for
// want of a credential that a broken file holds.
type explained struct {
	upstream
	credentials *credentials.DockerConfig
}

func (e explained) FetchIndexes(ctx context.Context, req image.Request) (*image.Image, error) {
	im, err := e.upstream.FetchIndexes(ctx, req)
	return im, e.credentials.Explain(err)
}

func (e explained) Document(ctx context.Context, req image.DocumentRequest) (*image.Document, error) {
	doc, err := e.upstream.Document(ctx, req)
	return doc, e.credentials.Explain(err)
}

// runNode serves FUSE first, since containers may be waiting for the answers to
// their reads, and stops serving it last.
func runNode(ctx context.Context, c *config.Node, load func() (*config.Node, error), store *fdstore.Store) (err error) {
	log, level := newLeveledLogger(c.Log)
	reload := newReloader(c, load, log)
	daemon.LimitMemory(log)
	if !store.Kept() {
		log.Warn("no descriptor store holds this process's descriptors: if the process ends, containers on lazy mounts get I/O errors; start it with `shoal keep -- shoal node`, or with the systemd unit that comes with shoal")
	}
	if err := os.MkdirAll(c.Root, 0o700); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	policy, err := c.Policy()
	if err != nil {
		return err
	}
	source := newLateSource()
	var late parts
	reads := newReadSeconds()
	vols, err := volume.Open(ctx, volume.Config{
		Root: c.Root, Source: source, Profiles: source, Log: log, Keep: store, Describe: late.describe, Observe: reads.observe,
		ReadTimeout: time.Duration(c.ReadTimeout), ScrubInterval: scrubInterval(c), Loop: c.Mount == config.MountLoop,
		Cache: cache.Config{
			Timeout:      time.Duration(c.ReadTimeout),
			PrefetchRate: int64(c.PrefetchRate),
			Quota:        int64(c.CacheQuota), MakeRoom: late.evict, Inflight: late.inflight,
		},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vols.Close()) }()
	late.vols.Store(vols)

	metrics := daemon.NewMetrics(version, "node")
	stopTracing, err := daemon.Trace(ctx, "shoal-node", version)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopTracing()) }()
	ports, err := daemon.NewPorts(log, metrics)
	if err != nil {
		return err
	}
	state := daemon.Starting("the node is starting")
	defer ports.Serve(ctx, "metrics_address", c.MetricsAddress, daemon.Metrics(metrics, state))()
	up, membership, err := openUpstream(ctx, c, ports, log, metrics)
	if err != nil {
		return err
	}
	var reach reach // an embedded supernode is always there
	if r, ok := up.(*remote); ok {
		late.swarm.Store(r.swarm)
		reach.status = r.Status
		reach.away = func() bool { return r.Away(readPatience(c)) }
	}
	membership.watch(vols)
	defer func() { err = errors.Join(err, up.Close()) }()
	keychain := credentials.NewDockerConfig(ctx, c.DockerConfig, log)
	plain := up
	up = explained{up, keychain}
	src, err := newSources(c, up, reach, &late, keychain, log, metrics)
	if err != nil {
		return err
	}
	source.set(src)
	defer func() {
		vols.EndStartups() // reports what it was recording
		source.end()
		err = errors.Join(err, src.Close())
	}()
	stopSharing, err := share(c, plain, vols, log, metrics)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopSharing()) }()

	catalogue, err := images.Open(images.Config{
		Root: c.Root, Data: vols, Images: up,
		Credentials: keychain, NodeCredentials: c.NodeCredentialsForPulls, Remote: remoteSupernode(c), Platform: platform(),
		Policy:            policy,
		PrefetchAfterPull: c.PrefetchAfterPull, PrefetchAfterExit: c.PrefetchAfterExit,
		Groups:       membership.groups(),
		IndexTimeout: time.Duration(c.IndexTimeout), Log: log,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, catalogue.Close()) }()
	late.images.Store(catalogue)
	sn, err := snapshotter.New(snapshotter.Config{Root: c.Root, Images: catalogue, PrepareTimeout: time.Duration(c.PrepareTimeout), Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()

	registryMirror, listenMirror, err := newMirror(c, plain, catalogue, keychain, store, log, metrics)
	if err != nil {
		return err
	}
	embedded, _ := plain.(*supernode.Supernode)
	reload.on(func(c *config.Node) error { return setLevel(level, c.Log.Level) }, "log.level")
	reload.on(func(c *config.Node) error {
		policy, err := c.Policy()
		if err == nil {
			catalogue.SetPolicy(policy)
		}
		return err
	}, "images.lazy", "images.never", "images.eager", "images.prefetch", "prefetch")
	reload.on(func(c *config.Node) error { vols.SetPrefetchRate(int64(c.PrefetchRate)); return nil }, "prefetch_rate")
	reloadUpstream(reload, c, plain)
	d := &nodeDaemon{reloader: reload, vols: vols, sn: sn, images: catalogue, up: up, embedded: embedded, credentials: keychain, supernodes: supernodeNames(plain)}
	metrics.MustRegister(append(d.collectors(), reads)...)
	calls, err := timeCalls(metrics)
	if err != nil {
		return err
	}
	server := grpc.NewServer(append(newOnlyOne(log).options(), daemon.TraceGRPC(), calls)...)
	snapshotter.Register(server, sn)
	ln, err := listenKept(store, keptContainerd, unixSocket(c.Address), log)
	if err != nil {
		return err
	}
	controlLn, err := listenKept(store, keptControl, unixSocket(c.ControlAddress), log)
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	var mirrorPort *daemon.Port
	if c.MirrorAddress != "" {
		mirrorPort = ports.Open("mirror_address", c.MirrorAddress, listenMirror)
	}
	if err := store.DropRest(); err != nil {
		log.Error("cannot drop descriptors that another version stored", "error", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Serve(ln) })
	g.Go(func() error {
		<-ctx.Done()
		err := store.Stopping()
		daemon.StopGRPC(server)
		return err
	})
	g.Go(func() error { return control.ServeOn(ctx, controlLn, d) })
	// What fails here must not take away what containers read from.
	var beside sync.WaitGroup
	defer beside.Wait()
	beside.Go(func() { reload.serve(ctx) })
	beside.Go(func() { mirrorPort.ServeHTTP(ctx, registryMirror) })
	beside.Go(func() {
		if err := store.Watch(ctx, vols.Check); err != nil {
			log.Error("cannot report that the node is alive; systemd or shoal keep may end it", "error", err)
		}
	})
	state.Set(nil, func() error {
		if err := ctx.Err(); err != nil {
			return errors.New("the node is stopping")
		}
		return membership.answered()
	})
	log.Info("node is up", "version", version, "socket", c.Address, "supernodes", d.supernodes())
	if err := store.Ready(); err != nil {
		log.Error("cannot report that the node is ready", "error", err)
	}
	return g.Wait()
}

// scrubInterval is as package volume wants it.
func scrubInterval(c *config.Node) time.Duration {
	if c.ScrubInterval == 0 {
		return -1
	}
	return time.Duration(c.ScrubInterval)
}

// openUpstream connects to the supernode, or embeds one. The membership is nil if
// it does the latter.
func openUpstream(ctx context.Context, c *config.Node, ports *daemon.Ports, log *slog.Logger, reg prometheus.Registerer) (upstream, *membership, error) {
	if len(c.Supernodes) == 0 {
		s, err := openSupernode(filepath.Join(c.Root, "supernode"), c.Embedded.Store, c.Embedded.Registry, place{}, log, reg)
		return s, nil, err
	}
	m, err := openMembership(ctx, c, ports, log, reg)
	if err != nil {
		return nil, nil, err
	}
	in := newIntake(c)
	up, err := openLinks(c, m, exchange.Options{Window: in.window, Download: in.download, Frames: in.frames, Away: readPatience(c), Log: log})
	if err != nil {
		return nil, nil, errors.Join(err, m.close())
	}
	r, err := newRemote(c, up, in, log, reg)
	if err != nil {
		return nil, nil, errors.Join(err, up.Close(), m.close())
	}
	return r, m, nil
}

// reloadUpstream adds what a node does when the keys of where it gets things from change.
func reloadUpstream(reload *reloader[*config.Node], running *config.Node, up upstream) {
	switch up := up.(type) {
	case *supernode.Supernode:
		reloadRegistry(reload, "embedded.", up, func(c *config.Node) config.Registry { return c.Embedded.Registry })
	case *remote:
		reloadSupernodes(reload, up.links, remoteSupernode(running))
		reload.on(func(c *config.Node) error { up.download.Set(int64(c.MaxDownload)); return nil }, "max_download")
		reload.on(func(c *config.Node) error { up.upload.Set(int64(c.MaxUpload)); return nil }, "max_upload")
	}
}

// supernodeNames returns what says who the supernodes are.
func supernodeNames(up upstream) func() []string {
	r, ok := up.(*remote)
	if !ok {
		return func() []string { return []string{"embedded"} }
	}
	return func() []string { return *r.names.Load() }
}

// nodeDaemon answers the control socket.
type nodeDaemon struct {
	*reloader[*config.Node]
	vols        *volume.Manager
	sn          *snapshotter.Snapshotter
	images      *images.Catalogue
	up          upstream
	embedded    *supernode.Supernode // nil: the node uses others
	credentials *credentials.DockerConfig
	supernodes  func() []string // their addresses
}

func (d *nodeDaemon) Status(ctx context.Context) (*control.Status, error) {
	list, err := d.images.Images(ctx)
	if err != nil {
		return nil, err
	}
	users, err := d.vols.LazyUsers()
	if err != nil {
		return nil, err
	}
	st := &control.Status{Version: version, Role: "node", Supernodes: d.supernodes(), Images: []control.Image{}}
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

func (d *nodeDaemon) layer(id blockdev.Digest) control.Layer {
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

func (d *nodeDaemon) Prefetch(ctx context.Context, req control.PrefetchRequest, event func(control.Event)) error {
	ref, err := normalize(req.Ref)
	if err != nil {
		return err
	}
	if !req.Local {
		return d.warm(ctx, ref, event)
	}
	im, err := d.images.Keep(ctx, ref, blockdev.Digest{})
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

// warm has the supernode fetch an image.
func (d *nodeDaemon) warm(ctx context.Context, ref string, event func(control.Event)) error {
	cred, err := d.credentials.Credential(ctx, ref)
	if err != nil {
		return err
	}
	im, err := d.up.FetchIndexes(ctx, image.Request{Ref: ref, Platform: platform(), Credential: cred, Progress: layerEvents(event)})
	if err != nil {
		return err
	}
	for _, l := range im.Layers { // also those that were stored before anything was said
		event(control.Event{Layer: l.Digest.String(), Stage: string(image.StageStored), Done: l.Size, Total: l.Size})
	}
	return nil
}
