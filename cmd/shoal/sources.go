package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/chain"
	"github.com/shoalfs/shoal/blockdev/volume"
	"github.com/shoalfs/shoal/cmd/shoal/internal/config"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node/direct"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/internal/registry/credentials"
	"github.com/shoalfs/shoal/p2p/swarm"
	"github.com/shoalfs/shoal/snapshotter/images"
)

const (
	// supernodePatience is the most that readPatience is.
	supernodePatience = 10 * time.Second
	// registryPrefetch is how long the supernode must have brought nothing before
	// prefetch goes to the registry.
	registryPrefetch = time.Minute
)

// readPatience is how long a read waits for the supernodes, and for the nodes before
// them, to bring anything before the registry is asked, whether they are silent or cannot
// be reached. None waits longer than that for supernodes that went away, or that were
// not there when the node started.
func readPatience(c *config.Node) time.Duration {
	return min(supernodePatience, time.Duration(c.ReadTimeout)/5)
}

// parts are those parts of a node that others, which are made before them, call
// back.
type parts struct {
	images atomic.Pointer[images.Catalogue]
	vols   atomic.Pointer[volume.Manager]
	swarm  atomic.Pointer[swarm.Swarm]
}

// inflight is cache.Config.Inflight.
func (p *parts) inflight() int64 {
	if s := p.swarm.Load(); s != nil {
		return s.Inflight()
	}
	return aloneInflight
}

// aloneInflight is how many bytes of prefetch are under way where there are no peers.
const aloneInflight = 4 << 20

// evict is cache.Config.MakeRoom.
func (p *parts) evict(ctx context.Context) bool {
	c := p.images.Load()
	return c != nil && c.Evict(ctx)
}

// describe is volume.Config.Describe.
func (p *parts) describe(diff blockdev.Digest) []any {
	if c := p.images.Load(); c != nil {
		return c.Describe(diff)
	}
	return nil
}

// rewarm is chain.Step.Heal of the supernode.
func (p *parts) rewarm(ctx context.Context, diff blockdev.Digest) error {
	if c := p.images.Load(); c != nil {
		return c.Rewarm(ctx, diff)
	}
	return errStarting
}

var errStarting = errors.New("the node is still starting")

// layers is direct.Config.Layers.
func (p *parts) layers(_ context.Context, diff blockdev.Digest) ([]direct.Layer, error) {
	c := p.images.Load()
	if c == nil {
		return nil, errStarting
	}
	found, err := c.Origins(diff)
	var layers []direct.Layer
	for _, o := range found {
		layers = append(layers, direct.Layer{Ref: o.Ref, Manifest: o.Manifest, Digest: o.Digest, Size: o.Size})
	}
	return layers, err
}

// keep is direct.Config.Keep.
func (p *parts) keep(diff, chunk blockdev.Digest, data []byte) {
	if vols := p.vols.Load(); vols != nil {
		vols.Offer(diff, chunk, data)
	}
}

// sources is where a node's missing chunks come from: up, and at last the registry.
// Startup profiles go to up.
type sources struct {
	*chain.Chain
	blockdev.ProfileSink
	client *registry.Client
	direct *direct.Source
}

// reach says whether supernodes can be reached: chain.Step.Away and Status.
type reach struct {
	away   func() bool
	status func() error
}

// newSources makes the sources.
func newSources(c *config.Node, up chunksAndProfiles, reach reach, p *parts, keychain *credentials.DockerConfig, log *slog.Logger, metrics prometheus.Registerer) (*sources, error) {
	received, err := registryBytes(metrics)
	if err != nil {
		return nil, err
	}
	cfg := registry.Config{Log: log, Received: func(n int64) { received.Add(float64(n)) }}
	hosts := c.RegistryConfigPath
	if len(c.Supernodes) == 0 {
		hosts = c.Embedded.Registry.ConfigPath
	}
	if hosts != "" {
		cfg.HostDirs = []string{hosts}
	}
	client, err := registry.New(cfg)
	if err != nil {
		return nil, err
	}
	d, err := direct.New(direct.Config{Layers: p.layers, Keep: p.keep, Open: openBlob(client, p, keychain), Log: log})
	if err != nil {
		return nil, errors.Join(err, client.Close())
	}
	from := blockdev.FromLocal // the swarm tells peers and supernodes apart
	if len(c.Supernodes) == 0 {
		from = blockdev.FromSupernode
	}
	return &sources{
		ProfileSink: up,
		Chain: chain.New(
			chain.Step{Name: "supernode", Source: up, From: from, Patience: readPatience(c), Away: reach.away, Status: reach.status, Heal: p.rewarm},
			chain.Step{Name: "registry", Source: d, From: blockdev.FromRegistry, PrefetchAfter: registryPrefetch}),
		client: client, direct: d,
	}, nil
}

// registryBytes is the metric of what the last source has brought.
func registryBytes(metrics prometheus.Registerer) (prometheus.Counter, error) {
	c := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "shoal_node_registry_bytes_total", Help: "Bytes that this node has received from registries when it read layers itself.",
	})
	return c, metrics.Register(c)
}

func (s *sources) Close() error { return errors.Join(s.direct.Close(), s.client.Close()) }

// credential is what a registry is asked with for bytes of an image that is here.
func (p *parts) credential(ctx context.Context, ref string) (image.Credential, error) {
	if c := p.images.Load(); c != nil {
		return c.SourceCredential(ctx, ref)
	}
	return image.Credential{}, errStarting
}

// openBlob is direct.Config.Open, with what the image was pulled with, or else the
// node's own credentials.
func openBlob(client *registry.Client, p *parts, keychain *credentials.DockerConfig) func(context.Context, direct.Layer, int64) (io.ReadCloser, error) {
	return func(ctx context.Context, l direct.Layer, offset int64) (io.ReadCloser, error) {
		ref, err := registry.ParseReference(l.Ref)
		if err != nil {
			return nil, err
		}
		cred, err := p.credential(ctx, l.Ref)
		if err != nil {
			return nil, err
		}
		m := &registry.Manifest{Ref: l.Ref, Host: ref.Host, Repository: ref.Repository, Digest: l.Manifest}
		// The type says no more than that it is a blob.
		layer := registry.Layer{Digest: l.Digest, Size: l.Size, MediaType: ocispec.MediaTypeImageLayerGzip}
		rc, err := client.Fetch(ctx, m, layer, cred, offset)
		if errors.Is(err, blockdev.ErrUnauthorized) {
			// The pull's has expired, or was exchanged; the node's own may be newer.
			if own, cerr := keychain.Credential(ctx, l.Ref); cerr == nil && own != cred && own != (image.Credential{}) {
				cred = own
				rc, err = client.Fetch(ctx, m, layer, cred, offset)
			}
		}
		if cred != (image.Credential{}) && errors.Is(err, blockdev.ErrUnauthorized) {
			// A credential that has expired does not keep anybody from what is public.
			rc, err = client.Fetch(ctx, m, layer, image.Credential{}, offset)
		}
		return rc, keychain.Explain(err)
	}
}
