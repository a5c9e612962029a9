package node

import (
	"context"
	"errors"
	"io"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/chain"
	"github.com/shoalfs/shoal/blockdev/volume"
	"github.com/shoalfs/shoal/cmd/shoal/internal/node/direct"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/internal/registry"
	"github.com/shoalfs/shoal/snapshotter/images"
)

// registryPrefetch is how long the supernode must have brought nothing before
// prefetch goes to the registry.
const registryPrefetch = time.Minute

// attach lets reads have what is missing: from the upstream, and at last from the
// registry.
func (d *Daemon) attach(context.Context) error {
	cfg := registry.Config{Log: d.log, Received: d.metrics.Received}
	hosts := d.cfg.RegistryConfigPath
	if len(d.cfg.Supernodes) == 0 {
		hosts = d.cfg.Embedded.Registry.ConfigPath
	}
	if hosts != "" {
		cfg.HostDirs = []string{hosts}
	}
	client, err := registry.New(cfg)
	if err != nil {
		return err
	}
	d.closers.Add(client.Close)
	last, err := direct.New(direct.Config{Origins: d.images.Origins, Keep: d.vols.Offer, Open: d.openBlob(client), Log: d.log})
	if err != nil {
		return err
	}
	d.closers.Add(last.Close)
	first := d.up.first
	first.Heal = d.images.Rewarm
	err = d.vols.Attach(volume.Upstream{
		Source:   chain.New(first, chain.Step{Name: "registry", Source: last, From: blockdev.FromRegistry, PrefetchAfter: registryPrefetch}),
		Profiles: d.up.source, Inflight: d.up.inflight, MakeRoom: d.images.Evict, Describe: d.images.Describe,
	})
	d.closers.Add(func() error { d.vols.Detach(); return nil })
	return err
}

// openBlob is direct.Config.Open, with what the image was pulled with, or else the
// node's own credentials.
func (d *Daemon) openBlob(client *registry.Client) func(context.Context, images.Origin, int64) (io.ReadCloser, error) {
	return func(ctx context.Context, l images.Origin, offset int64) (io.ReadCloser, error) {
		ref, err := registry.ParseReference(l.Ref)
		if err != nil {
			return nil, err
		}
		cred, err := d.images.SourceCredential(ctx, l.Ref)
		if err != nil {
			return nil, err
		}
		m := &registry.Manifest{Ref: l.Ref, Host: ref.Host, Repository: ref.Repository, Digest: l.Manifest}
		// The type says no more than that it is a blob.
		layer := registry.Layer{Digest: l.Digest, Size: l.Size, MediaType: ocispec.MediaTypeImageLayerGzip}
		rc, err := client.Fetch(ctx, m, layer, cred, offset)
		if errors.Is(err, blockdev.ErrUnauthorized) {
			// The pull's has expired, or was exchanged; the node's own may be newer.
			if own, cerr := d.keychain.Credential(ctx, l.Ref); cerr == nil && own != cred && own != (image.Credential{}) {
				cred = own
				rc, err = client.Fetch(ctx, m, layer, cred, offset)
			}
		}
		if cred != (image.Credential{}) && errors.Is(err, blockdev.ErrUnauthorized) {
			// A credential that has expired does not keep anybody from what is public.
			rc, err = client.Fetch(ctx, m, layer, image.Credential{}, offset)
		}
		return rc, d.keychain.Explain(err)
	}
}
