package snapshotter

import (
	"bytes"
	"context"
	"encoding/json"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/shoalfs/shoal/blockdev"
)

// containerd is as much of it as a pull and a garbage collection need, with the
// snapshotter behind a socket.
type containerd struct {
	t     testing.TB
	store content.Store
	db    *metadata.DB
	sn    snapshots.Snapshotter
}

func newContainerd(t testing.TB, s snapshots.Snapshotter) *containerd {
	dir := t.TempDir()
	client, stop, err := serve(filepath.Join(dir, "sock"), s)
	check(t, err)
	t.Cleanup(stop)
	blobs := must(local.NewStore(filepath.Join(dir, "content")))(t)
	bdb := must(bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil))(t)
	t.Cleanup(func() { check(t, bdb.Close()) })
	db := metadata.NewDB(bdb, blobs, map[string]snapshots.Snapshotter{"shoal": client})
	check(t, db.Init(bg))
	return &containerd{t: t, store: db.ContentStore(), db: db, sn: db.Snapshotter("shoal")}
}

// ociImage is a manifest, its config and its layers, by digest.
func ociImage(t testing.TB, ref string, layers ...layer) (ocispec.Descriptor, map[digest.Digest][]byte, testImage) {
	t.Helper()
	blobs := make(map[digest.Digest][]byte)
	put := func(mediaType string, v any) ocispec.Descriptor {
		b, ok := v.([]byte)
		if !ok {
			b = must(json.Marshal(v))(t)
		}
		d := digest.FromBytes(b)
		blobs[d] = b
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
	}
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for i := range layers {
		layers[i].digest = layers[i].diffID // uncompressed layers
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.Digest(layers[i].diffID.String()))
		m.Layers = append(m.Layers, put(ocispec.MediaTypeImageLayer, layers[i].tar))
	}
	m.Config = put(ocispec.MediaTypeImageConfig, config)
	desc := put(ocispec.MediaTypeImageManifest, m)
	return desc, blobs, testImage{ref: ref, manifest: must(blockdev.ParseDigest(desc.Digest.String()))(t), layers: layers}
}

// pull is what containerd's client does. It returns the layers that were fetched.
func (c *containerd) pull(ctx context.Context, ref string, desc ocispec.Descriptor, blobs map[digest.Digest][]byte) (fetched []digest.Digest, err error) {
	u, err := unpack.NewUnpacker(ctx, c.store, unpack.WithUnpackPlatform(unpack.Platform{
		SnapshotterKey: "shoal", Snapshotter: c.sn, Applier: apply.NewFileSystemApplier(c.store),
	}))
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	fetch := images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if images.IsLayerType(d.MediaType) {
			mu.Lock()
			fetched = append(fetched, d.Digest)
			mu.Unlock()
		}
		return nil, content.WriteBlob(ctx, c.store, d.Digest.String(), bytes.NewReader(blobs[d.Digest]), d)
	})
	children := snapshotters.AppendInfoHandlerWrapper(ref)(images.ChildrenHandler(c.store))
	err = images.Dispatch(ctx, u.Unpack(images.Handlers(fetch, children)), nil, desc)
	if err == nil {
		_, err = u.Wait()
	}
	return fetched, err
}

// containerd's own unpacker and metadata store, through gRPC: no layer byte is
// fetched, in two namespaces; its garbage collection frees everything.
func TestContainerdPull(t *testing.T) {
	n := newNode(t)
	c := newContainerd(t, n)
	desc, blobs, img := ociImage(t, "registry.test/app:1", threeLayers(t)...)
	n.images.publish(img)
	for _, ns := range []string{"default", "k8s.io"} {
		ctx := namespaces.WithNamespace(bg, ns)
		lm := metadata.NewLeaseManager(c.db)
		must(lm.Create(ctx, leases.WithID("pull")))(t)
		ctx = leases.WithLease(ctx, "pull")
		fetched, err := c.pull(ctx, img.ref, desc, blobs)
		check(t, err)
		if len(fetched) != 0 {
			t.Fatalf("layers %v were fetched; log:\n%s", fetched, n.log.b.String())
		}
		checkThree(t, mounted(t, must(c.sn.Prepare(ctx, "c", img.chain(2)))(t)))
		if usage := must(c.sn.Usage(ctx, img.chain(0)))(t); usage.Size == 0 {
			t.Error("no usage")
		}
	}
	if len(n.log.lines("not lazy")) != 0 {
		t.Errorf("log:\n%s", n.log.b.String())
	}
	for _, ns := range []string{"default", "k8s.io"} {
		ctx := namespaces.WithNamespace(bg, ns)
		check(t, metadata.NewLeaseManager(c.db).Delete(ctx, leases.Lease{ID: "pull"}))
		must(c.db.GarbageCollect(ctx))(t)
		if gone := len(n.data.removed) > 0; gone != (ns == "k8s.io") {
			t.Errorf("after namespace %s is empty, diffs removed: %v", ns, gone)
		}
	}
	for _, l := range img.layers {
		if n.data.has(l) {
			t.Error("a diff outlives the garbage collection")
		}
	}
	// Both containers' directories and all snapshots.
	check(t, n.Walk(bg, func(_ context.Context, info snapshots.Info) error {
		t.Errorf("snapshot %s is still there", info.Name)
		return nil
	}))
}

// With the supernode gone the same pull fetches every layer, and works.
func TestContainerdFallback(t *testing.T) {
	n := newNode(t)
	c := newContainerd(t, n)
	desc, blobs, img := ociImage(t, "registry.test/app:1", threeLayers(t)...)
	n.images.err = blockdev.ErrUnavailable
	ctx := namespaces.WithNamespace(bg, "default")
	must(metadata.NewLeaseManager(c.db).Create(ctx, leases.WithID("pull")))(t)
	ctx = leases.WithLease(ctx, "pull")
	fetched, err := c.pull(ctx, img.ref, desc, blobs)
	check(t, err)
	if len(fetched) != 3 || slices.Contains(fetched, desc.Digest) {
		t.Errorf("fetched %v", fetched)
	}
	checkThree(t, mounted(t, must(c.sn.Prepare(ctx, "c", img.chain(2)))(t)))
	if len(n.log.lines("not lazy")) != 1 || n.images.asked() != 1 {
		t.Errorf("asked %d times; log:\n%s", n.images.asked(), n.log.b.String())
	}
	// The next image on the same base is lazy above it.
	desc, blobs, next := ociImage(t, "registry.test/next:1", img.layers[0], newLayer(t, dir("opt", 0o755), file("opt/x")))
	n.images.err = nil
	n.images.publish(next)
	fetched, err = c.pull(ctx, next.ref, desc, blobs)
	check(t, err)
	if len(fetched) != 0 {
		t.Errorf("fetched %v; log:\n%s", fetched, n.log.b.String())
	}
	root := mounted(t, must(c.sn.Prepare(ctx, "d", next.chain(1)))(t))
	if read(t, root, "opt/x") != "opt/x" || read(t, root, "bin/sh") != "bin/sh" {
		t.Error("wrong content")
	}
}
