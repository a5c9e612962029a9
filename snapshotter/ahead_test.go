package snapshotter

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
	"github.com/shoalfs/shoal/snapshotter/policy"
)

// private makes a fake supernode's images ones that only cred opens.
func (f *fakeImages) private(cred image.Credential) { f.set(func() { f.want = &cred }) }

// repository is host/repository of a test image.
func repository(img testImage) string { return img.ref[:strings.LastIndexByte(img.ref, ':')] }

var tenant = image.Credential{Username: "tenant", Secret: "secret"}

// A private image is lazy for a pull that has shown a credential at the mirror, by
// the name that containerd has for it, and unpacked for one that has not; the node's
// own credential opens nothing, unless the config says so.
func TestPullOfPrivateImage(t *testing.T) {
	for _, c := range []struct {
		name string
		show bool
		cred image.Credential
		node bool
		lazy bool
	}{
		{"right", true, tenant, false, true},
		{"wrong", true, image.Credential{Username: "x", Secret: "y"}, false, false},
		{"none", true, image.Credential{}, false, false},
		{"without the mirror", false, tenant, false, false},
		{"with the node's", false, tenant, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, func(cfg *nodeConfig) {
				cfg.Credentials, cfg.NodeCredentials = always(tenant), c.node
			})
			img := newImage("registry.test/x:1", threeLayers(t)...)
			n.images.publish(img)
			n.images.private(tenant)
			if c.show {
				n.Begin("registry.test/x", "", img.manifest, nil, c.cred)
				n.Await(bg, "registry.test/x", img.manifest)
			}
			top, fetched, err := n.pull(bg, img)
			check(t, err)
			if lazy := len(fetched) == 0; lazy != c.lazy {
				t.Fatalf("lazy: %v; log:\n%s", lazy, n.log.b.String())
			}
			if n.images.asked() != 1 {
				t.Errorf("the supernode was asked %d times", n.images.asked())
			}
			checkThree(t, mounted(t, must(n.View(bg, "v", top))(t)))
			if list := must(n.Images(bg))(t); c.lazy && (len(list) != 1 || list[0].Ref != img.ref) {
				t.Errorf("images: %+v", list)
			}
		})
	}
}

// always is a node's credential for everything.
type always image.Credential

func (a always) Credential(context.Context, string) (image.Credential, error) {
	return image.Credential(a), nil
}

func (always) Explain(err error) error { return err }

// broken are a node's credentials that cannot be read.
type broken struct{}

func (broken) Credential(context.Context, string) (image.Credential, error) {
	return image.Credential{}, nil
}

func (broken) Explain(err error) error { return fmt.Errorf("%w (config.json is broken)", err) }

// Where access is denied, the error says what is wrong with the node's credentials.
func TestDeniedIsExplained(t *testing.T) {
	n := newNode(t, func(cfg *nodeConfig) { cfg.Credentials = broken{} })
	img := newImage("registry.test/x:1", newLayer(t, file("a")))
	n.images.publish(img)
	n.images.private(tenant)
	if _, err := n.Keep(bg, img.ref, img.manifest); err == nil || !strings.Contains(err.Error(), "config.json is broken") {
		t.Errorf("%v", err)
	}
}

// Where snapshot annotations are off, a manifest's own reach the snapshotter, and may
// name another tenant's image: nothing of it is opened.
func TestSpoofedReferenceOpensNothing(t *testing.T) {
	n := newNode(t, func(cfg *nodeConfig) { cfg.Credentials = always(tenant) })
	c := newContainerd(t, n)
	_, _, secret := ociImage(t, "registry.test/secret:1", newLayer(t, file("secret")))
	n.images.publish(secret)
	n.images.private(tenant)
	// Mallory knows DiffID and digests of the secret testImage, not its bytes.
	desc, blobs, _ := ociImage(t, "mallory.test/x:1", secret.layers[0])
	var m ocispec.Manifest
	check(t, json.Unmarshal(blobs[desc.Digest], &m))
	delete(blobs, m.Layers[0].Digest) // has no such blob
	desc = annotate(t, desc, blobs, &testImage{}, map[string]string{
		snapshotters.TargetRefLabel:            secret.ref,
		snapshotters.TargetManifestDigestLabel: secret.manifest.String(),
		snapshotters.TargetLayerDigestLabel:    m.Layers[0].Digest.String(),
	})
	ctx := namespaces.WithNamespace(bg, "k8s.io")
	must(metadata.NewLeaseManager(c.db).Create(ctx, leases.WithID("pull")))(t)
	ctx = leases.WithLease(ctx, "pull")
	u := must(unpack.NewUnpacker(ctx, c.store, unpack.WithUnpackPlatform(unpack.Platform{SnapshotterKey: "shoal", Snapshotter: c.sn, Applier: apply.NewFileSystemApplier(c.store)})))(t)
	fetch := images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		b, ok := blobs[d.Digest]
		if !ok {
			return nil, fmt.Errorf("blob %s: %w", d.Digest, errdefs.ErrNotFound)
		}
		return nil, content.WriteBlob(ctx, c.store, d.Digest.String(), bytes.NewReader(b), d)
	})
	err := images.Dispatch(ctx, u.Unpack(images.Handlers(fetch, images.ChildrenHandler(c.store))), nil, desc)
	if err == nil {
		_, err = u.Wait()
	}
	if err == nil {
		t.Error("the pull went through")
	}
	for _, r := range n.images.requests {
		if r.Credential != (image.Credential{}) {
			t.Errorf("the node opened %s with a credential of its own", r.Ref)
		}
	}
	if n.data.has(secret.layers[0]) {
		t.Error("the node has the secret layer")
	}
}

// The image is waited for at the mirror, not in Prepare, whoever leaves; and an eager
// one until every byte is here.
func TestOpenedAhead(t *testing.T) {
	n := newNode(t, func(cfg *nodeConfig) {
		cfg.Policy = must(policy.New(policy.Rules{Eager: []string{"registry.test/eager"}, Lazy: []string{"*"}, Default: policy.All}))(t)
	})
	gate := make(chan struct{})
	n.images.set(func() { n.images.gate = gate })
	for _, name := range []string{"lazy", "eager"} {
		img := newImage("registry.test/"+name+":1", newLayer(t, file(name)))
		n.images.publish(img)
		n.Begin("registry.test/"+name, "1", img.manifest, nil, image.Credential{})
		if name == "lazy" {
			ctx, cancel := context.WithTimeout(bg, time.Millisecond)
			n.Await(ctx, "registry.test/"+name, img.manifest)
			cancel()
			close(gate)
		}
		n.Await(bg, "registry.test/"+name, img.manifest)
		if waited := len(n.data.waited) > 0; waited != (name == "eager") {
			t.Errorf("%s: waited for bytes: %v", name, waited)
		}
		if _, err := n.Prepare(bg, "ns/1/"+name, "", snapshots.WithLabels(img.labels(0))); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n.images.asked() != 2 {
		t.Errorf("asked %d times", n.images.asked())
	}
}

// An image that is opened ahead asks for no index that is here already. If all layers are
// here, then no Prepare comes, and the image is here although nobody claims its opening.
func TestOpenedAheadOfLayersThatAreHere(t *testing.T) {
	n := newNode(t)
	ls := threeLayers(t)
	digests := func(ls ...layer) (all []blockdev.Digest) {
		for _, l := range ls {
			all = append(all, l.digest)
		}
		return all
	}
	first := newImage("registry.test/x:1", ls...)
	n.images.publish(first)
	_, _, err := n.pull(bg, first)
	check(t, err)
	for i, c := range []struct{ layers, have []layer }{
		{append([]layer{newLayer(t, file("other"))}, ls[1:]...), ls[1:]},
		{ls, ls},
	} {
		img := newImage(fmt.Sprintf("registry.test/x:%d", i+2), c.layers...)
		n.images.publish(img)
		n.Begin(repository(img), fmt.Sprint(i+2), img.manifest, digests(c.layers...), image.Credential{})
		n.Await(bg, repository(img), img.manifest)
		have, want := n.images.requests[i+1].Have, digests(c.have...)
		slices.SortFunc(have, func(a, b blockdev.Digest) int { return bytes.Compare(a[:], b[:]) })
		slices.SortFunc(want, func(a, b blockdev.Digest) int { return bytes.Compare(a[:], b[:]) })
		if !slices.Equal(have, want) {
			t.Errorf("%s: Have is %v, want %v", img.ref, have, want)
		}
	}
	var refs []string
	for _, img := range must(n.Images(bg))(t) {
		refs = append(refs, img.Ref)
	}
	if !slices.Contains(refs, "registry.test/x:3") {
		t.Errorf("images: %v", refs)
	}
}

// Where containerd does not write the names of images, a name that a layer has all the
// same is an annotation of a manifest: it opens no private image, also right after a
// pull that may have it. A right is gone with the pull that has shown it.
func TestNamesOfManifests(t *testing.T) {
	n := newNode(t, func(cfg *nodeConfig) {})
	begin := func(img testImage, cred image.Credential) {
		n.Begin(repository(img), "1", img.manifest, nil, cred)
		n.Await(bg, repository(img), img.manifest)
	}
	secret := newImage("registry.test/secret:1", newLayer(t, file("secret")))
	n.images.publish(secret)
	n.images.private(tenant)
	begin(secret, tenant)
	unnamed := newImage("registry.test/other:1", newLayer(t, file("other"))).labels(0)
	delete(unnamed, snapshotters.TargetRefLabel)
	_, err := n.Prepare(bg, "ns/9/other", "", snapshots.WithLabels(unnamed))
	check(t, err)
	if _, fetched, err := n.pull(bg, secret); err != nil || len(fetched) != 1 {
		t.Errorf("fetched %v, %v: the private image was opened by a name that anybody can write", fetched, err)
	}
	if lines := n.log.lines("disable_snapshot_annotations = false"); len(lines) != 1 {
		t.Errorf("log:\n%s", n.log.b.String())
	}
	public := newImage("registry.test/public:1", newLayer(t, file("public")))
	n.images.publish(public)
	n.images.private(image.Credential{})
	begin(public, image.Credential{})
	if _, fetched, err := n.pull(bg, public); err != nil || len(fetched) != 0 {
		t.Errorf("fetched %v, %v: what anybody may have is lazy all the same", fetched, err)
	}

	// In a namespace with names, a pull's right ends with the pull.
	n = newNode(t, func(cfg *nodeConfig) {})
	n.images.publish(secret)
	n.images.private(tenant)
	begin(secret, tenant)
	if _, fetched, err := n.pull(bg, secret); err != nil || len(fetched) != 0 {
		t.Fatalf("fetched %v, %v", fetched, err)
	}
	check(t, n.Remove(bg, secret.chain(0)))
	if _, fetched, err := n.pull(bg, secret); err != nil || len(fetched) != 1 {
		t.Errorf("fetched %v, %v: the right outlives its pull", fetched, err)
	}
}

// Images that another snapshotter of this machine pulls through the mirror are not
// opened for ever.
func TestNotClaimed(t *testing.T) { synctest.Test(t, testNotClaimed) }

func testNotClaimed(t *testing.T) {
	n := newNode(t, func(cfg *nodeConfig) { cfg.PullIdle = 10 * time.Millisecond })
	var last testImage
	for i := range 3 {
		last = newImage(fmt.Sprintf("registry.test/x%d:1", i), newLayer(t, file(fmt.Sprint(i))))
		n.images.publish(last)
		name := fmt.Sprintf("registry.test/x%d", i)
		n.Begin(name, "1", last.manifest, nil, image.Credential{})
		n.Await(bg, name, last.manifest)
		time.Sleep(time.Second) // no Prepare comes
		synctest.Wait()
	}
	asked := n.images.asked()
	n.Begin("registry.test/new", "1", blockdev.Digest{1}, nil, tenant)
	n.Await(bg, "registry.test/new", blockdev.Digest{1})
	if n.images.asked() != asked {
		t.Error("an image was opened that nobody will ask for")
	}
	// One that comes for this snapshotter all the same is opened, and changes that.
	if _, fetched, err := n.pull(bg, last); err != nil || len(fetched) > 0 {
		t.Errorf("fetched %v: %v", fetched, err)
	}
	asked = n.images.asked()
	n.Begin("registry.test/new", "1", blockdev.Digest{1}, nil, tenant)
	n.Await(bg, "registry.test/new", blockdev.Digest{1})
	if n.images.asked() == asked {
		t.Error("one image that was asked for changes nothing")
	}
}

// A pull's credential is kept for as long as its image needs a source, and what this
// machine alone calls by a name is not asked of another one.
func TestSourceCredential(t *testing.T) {
	n := newNode(t, func(cfg *nodeConfig) {
		cfg.Remote, cfg.Credentials = true, always(image.Credential{Username: "node", Secret: "n"})
	})
	img := newImage("registry.test/x:1", newLayer(t, file("a")))
	n.images.publish(img)
	n.images.private(tenant)
	n.Begin("registry.test/x", "", img.manifest, nil, tenant)
	n.Await(bg, "registry.test/x", img.manifest)
	_, _, err := n.pull(bg, img)
	check(t, err)
	if cred := must(n.SourceCredential(bg, img.ref))(t); cred != tenant {
		t.Errorf("%+v", cred)
	}
	check(t, n.Cleanup(bg))
	if cred := must(n.SourceCredential(bg, img.ref))(t); cred != tenant {
		t.Errorf("while bytes are missing: %+v", cred)
	}
	n.data.set(func() { n.data.complete[img.layers[0].diffID] = true })
	check(t, n.Cleanup(bg))
	if cred := must(n.SourceCredential(bg, img.ref))(t); cred.Username != "node" {
		t.Errorf("when all bytes are here: %+v", cred)
	}
	asked := n.images.asked()
	local := newImage("localhost:5000/x:1", newLayer(t, file("b")))
	n.images.publish(local)
	if _, fetched, err := n.pull(bg, local); err != nil || len(fetched) != 1 || n.images.asked() != asked {
		t.Errorf("fetched %v, asked %d times: %v", fetched, n.images.asked()-asked, err)
	}
	if len(n.log.lines("only this machine knows")) != 1 {
		t.Errorf("log:\n%s", n.log.b.String())
	}
}
