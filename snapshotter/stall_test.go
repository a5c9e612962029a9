package snapshotter

import (
	"context"
	"encoding/json"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/index"
)

// hangingData is a data path whose waits for bytes, and removals, hang until gate
// is closed.
type hangingData struct {
	*fakeData
	gate    chan struct{}
	entered chan struct{}
	once    sync.Once
}

func (h *hangingData) hang(ctx context.Context) error {
	h.once.Do(func() { close(h.entered) })
	select {
	case <-h.gate:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (h *hangingData) PrefetchWait(ctx context.Context, _ blockdev.Digest, _ func(local, total int64)) error {
	return h.hang(ctx)
}

func (h *hangingData) Remove(ctx context.Context, id blockdev.Digest) error {
	if err := h.hang(ctx); err != nil {
		return err
	}
	return h.fakeData.Remove(ctx, id)
}

func newHangingNode(t *testing.T) (*node, *hangingData) {
	var h *hangingData
	n := newNode(t, func(c *nodeConfig) {
		h = &hangingData{fakeData: c.Data.(*fakeData), gate: make(chan struct{}), entered: make(chan struct{})}
		c.Data, c.PrepareTimeout = h, 300*time.Millisecond
	})
	return n, h
}

// annotate makes a manifest whose layers' descriptors carry annotations.
func annotate(t *testing.T, desc ocispec.Descriptor, blobs map[digest.Digest][]byte, img *testImage, annotations map[string]string) ocispec.Descriptor {
	var m ocispec.Manifest
	check(t, json.Unmarshal(blobs[desc.Digest], &m))
	for i := range m.Layers {
		m.Layers[i].Annotations = annotations
	}
	b := must(json.Marshal(m))(t)
	desc.Digest, desc.Size = digest.FromBytes(b), int64(len(b))
	blobs[desc.Digest] = b
	img.manifest = must(blockdev.ParseDigest(desc.Digest.String()))(t)
	return desc
}

// An image that does not come, for whatever reason, stops no container of another
// image: neither its pull, nor containerd's garbage collection behind it.
func TestOneImageStopsNoOther(t *testing.T) {
	for _, how := range []string{"annotation in the manifest", "slow supernode"} {
		t.Run(how, func(t *testing.T) {
			n, hanging := newHangingNode(t)
			c := newContainerd(t, n)
			ctx := namespaces.WithNamespace(bg, "k8s.io")
			must(metadata.NewLeaseManager(c.db).Create(ctx, leases.WithID("pull")))(t)
			ctx = leases.WithLease(ctx, "pull")
			desc, blobs, good := ociImage(t, "registry.test/good:1", threeLayers(t)...)
			n.images.publish(good)
			_, err := c.pull(ctx, good.ref, desc, blobs)
			check(t, err)
			must(c.sn.Prepare(ctx, "old", good.chain(2)))(t)

			desc, blobs, evil := ociImage(t, "registry.test/evil:1", newLayer(t, file("a")), newLayer(t, file("b")))
			entered := hanging.entered
			if how == "slow supernode" {
				n.images.set(func() {
					n.images.gate = hanging.gate
					n.images.entered = make(chan struct{}, 1)
					entered = n.images.entered
				})
			} else {
				desc = annotate(t, desc, blobs, &evil, map[string]string{LabelPrefetch: PrefetchWait})
			}
			n.images.publish(evil)
			pulled := make(chan error, 1)
			go func() { _, err := c.pull(ctx, evil.ref, desc, blobs); pulled <- err }()
			<-entered
			// Somebody removes a container, and containerd collects garbage. Nothing
			// opens the gate before another image's container is there.
			check(t, c.sn.Remove(ctx, "old"))
			must(c.db.GarbageCollect(ctx))(t)
			must(c.sn.Prepare(ctx, "new", good.chain(2)))(t)
			check(t, <-pulled)
			close(hanging.gate)
		})
	}
}

// Cleanup returns although a removal hangs, and the removal goes on.
func TestCleanupReturns(t *testing.T) {
	n, hanging := newHangingNode(t)
	img := newImage("registry.test/x:1", newLayer(t, file("a")))
	n.images.publish(img)
	_, _, err := n.pull(bg, img)
	check(t, err)
	check(t, n.Remove(bg, img.chain(0)))
	check(t, n.Cleanup(bg))
	if !n.data.has(img.layers[0]) {
		t.Error("the diff is gone while its removal hangs")
	}
	close(hanging.gate)
	check(t, n.Cleanup(bg))
	if n.data.has(img.layers[0]) {
		t.Error("the diff is still there")
	}
}

// A container whose layer's index was lost, and does not come, is not waited for;
// when it has come, the container starts.
func TestLostIndexReturns(t *testing.T) {
	n := newNode(t, func(c *nodeConfig) { c.PrepareTimeout = time.Second })
	img := newImage("registry.test/x:1", newLayer(t, file("a")))
	n.images.publish(img)
	top, _, err := n.pull(bg, img)
	check(t, err)
	must(n.Prepare(bg, "c", top))(t)
	check(t, n.data.Remove(bg, img.layers[0].diffID))
	gate := make(chan struct{})
	n.images.set(func() { n.images.gate = gate })
	if _, err := n.Prepare(bg, "d", top); !errdefs.IsUnavailable(err) {
		t.Errorf("Prepare: %v", err)
	}
	if _, err := n.Mounts(bg, "c"); !errdefs.IsUnavailable(err) {
		t.Errorf("Mounts: %v", err)
	}
	close(gate)
	for range 100 {
		if _, err = n.Prepare(bg, "d", top); err == nil {
			break
		}
	}
	check(t, err)
	if n.images.asked() != 2 {
		t.Errorf("asked %d times, one pull and one recovery", n.images.asked())
	}
}

// A fix-up that cannot be made is no reason for a pull to fail.
func TestFixupFails(t *testing.T) {
	n := newNode(t)
	bad := newLayer(t, file("x"))
	ix := must(index.Decode(bad.index))(t)
	ix.Implied = []string{"etc"} // which the layer has not
	bad.index = must(index.Encode(ix))(t)
	img := newImage("registry.test/x:1", newLayer(t, dir("etc", 0o700), file("etc/a")), bad)
	n.images.publish(img)
	top, fetched, err := n.pull(bg, img)
	check(t, err)
	if len(fetched) != 1 || fetched[0] != 1 || len(n.log.lines("not lazy", img.ref)) != 1 {
		t.Errorf("fetched %v; log:\n%s", fetched, n.log.b.String())
	}
	if root := mounted(t, must(n.View(bg, "v", top))(t)); read(t, root, "x") != "x" || read(t, root, "etc/a") != "etc/a" {
		t.Error("wrong content")
	}
}
