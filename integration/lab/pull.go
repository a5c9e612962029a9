package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Image is what a client learns of an image from its manifest and config.
type Image struct {
	// Ref is the image's reference, by the registry's address.
	Ref string
	// Manifest is the digest of its manifest.
	Manifest digest.Digest
	// Config and Layers are the manifest's blobs, without their data; layers have
	// a DiffID.
	Config Blob
	Layers []Blob

	chains []digest.Digest
}

// Compressed is the size of all layers as the registry has them, in bytes.
func (im *Image) Compressed() int64 {
	var n int64
	for _, l := range im.Layers {
		n += l.Size
	}
	return n
}

// Image reads an image's manifest and config.
func (r *Registry) Image(ctx context.Context, repository, tag string) (*Image, error) {
	im := &Image{Ref: r.Addr + "/" + repository + ":" + tag}
	body, err := r.get(ctx, repository+"/manifests/"+tag, 8<<20)
	if err != nil {
		return nil, err
	}
	im.Manifest = digest.FromBytes(body)
	var man struct {
		Config Blob
		Layers []Blob
	}
	if err := json.Unmarshal(body, &man); err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", im.Ref, err)
	}
	im.Config, im.Layers = man.Config, man.Layers
	if body, err = r.Blob(ctx, repository, im.Config.Digest); err != nil {
		return nil, err
	}
	var config struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal(body, &config); err != nil {
		return nil, fmt.Errorf("config of %s: %w", im.Ref, err)
	}
	if len(config.RootFS.DiffIDs) != len(im.Layers) {
		return nil, fmt.Errorf("%s: %d layers, %d DiffIDs", im.Ref, len(im.Layers), len(config.RootFS.DiffIDs))
	}
	for i, id := range config.RootFS.DiffIDs {
		im.Layers[i].DiffID = id.String()
	}
	im.chains = identity.ChainIDs(config.RootFS.DiffIDs)
	return im, nil
}

// Blob reads a blob, of 1 GiB at most.
func (r *Registry) Blob(ctx context.Context, repository, digest string) ([]byte, error) {
	return r.get(ctx, repository+"/blobs/"+digest, 1<<30)
}

func (r *Registry) get(ctx context.Context, path string, limit int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Addr+"/v2/"+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", MediaTypeManifest+", application/vnd.docker.distribution.manifest.v2+json")
	resp, err := r.lab.client().Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %.1024s", path, resp.Status, body)
	}
	return body, err
}

// snapshotter speaks to the node as containerd does.
func (n *Node) snapshotter() (snapshots.Snapshotter, io.Closer, error) {
	conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "shoal"), conn, nil
}

// Pull asks the node for an image's layers in the way containerd does, so that
// many nodes can be driven without a containerd for each. It fails if the node
// does not serve every layer lazily.
func (n *Node) Pull(ctx context.Context, im *Image) error {
	s, conn, err := n.snapshotter()
	if err != nil {
		return err
	}
	defer conn.Close()
	var all []string
	for _, l := range im.Layers {
		all = append(all, l.Digest)
	}
	parent := ""
	for i, l := range im.Layers {
		chain := im.chains[i].String()
		_, err := s.Prepare(ctx, "extract-"+chain, parent, snapshots.WithLabels(map[string]string{
			"containerd.io/snapshot.ref":           chain,
			snapshotters.TargetRefLabel:            im.Ref,
			snapshotters.TargetManifestDigestLabel: im.Manifest.String(),
			snapshotters.TargetLayerDigestLabel:    l.Digest,
			snapshotters.TargetImageLayersLabel:    strings.Join(all[i:], ","),
		}))
		if err == nil { // an ordinary one, which would be in the way of the next attempt
			err = s.Remove(ctx, "extract-"+chain)
		}
		if !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("%s on %s: layer %d is not lazy: %w\n%s", im.Ref, n.Name, i, orSuccess(err), Tail(n.Log, 5))
		}
		parent = chain
	}
	return nil
}

// Create makes a container's snapshot of an image that was pulled, read-only and
// without mounting it: the node fetches all of the image from then on.
func (n *Node) Create(ctx context.Context, im *Image, key string) error {
	s, conn, err := n.snapshotter()
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = s.View(ctx, key, im.chains[len(im.chains)-1].String())
	return err
}

// Mount mounts an image that was pulled, read-only, at dir, as for a container
// called key. The function that it returns unmounts it and removes what was made.
func (n *Node) Mount(ctx context.Context, im *Image, key, dir string) (unmount func() error, err error) {
	s, conn, err := n.snapshotter()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	mounts, err := s.View(ctx, key, im.chains[len(im.chains)-1].String())
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := mount.All(mounts, dir); err != nil {
		return nil, err
	}
	return func() error {
		s, conn, err := n.snapshotter()
		if err != nil {
			return err
		}
		defer conn.Close()
		return errors.Join(mount.UnmountAll(dir, 0), s.Remove(context.WithoutCancel(ctx), key))
	}, nil
}

// RemoveImage removes the snapshots of an image, as containerd's garbage
// collector does.
func (n *Node) RemoveImage(ctx context.Context, im *Image) error {
	s, conn, err := n.snapshotter()
	if err != nil {
		return err
	}
	defer conn.Close()
	for i := len(im.chains) - 1; i >= 0; i-- {
		if err := s.Remove(ctx, im.chains[i].String()); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	if c, ok := s.(snapshots.Cleaner); ok {
		return c.Cleanup(ctx)
	}
	return nil
}
