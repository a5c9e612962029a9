package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Resolver returns how the registry of an image is asked.
type Resolver func(ctx context.Context, image string) (remotes.Resolver, error)

// answer is how long containerd has for an answer.
const answer = 10 * time.Second

// MoveImages fetches the layers of every image that containerd, which listens at address,
// has lazily, and unpacks the images for the snapshotter to. The images' names and digests
// stay what they are, and so does what shoal has of them. done is called after each image.
// MoveImages goes on after a failure; the error names all images that could not be moved.
func MoveImages(ctx context.Context, address, from, to string, resolver Resolver, done func(namespace, image string, err error)) error {
	c, err := dial(address)
	if err != nil {
		return fmt.Errorf("containerd at %s: %w. Start containerd, or name its socket with --address", address, err)
	}
	defer func() { _ = c.Close() }() // nothing is lost by it
	spaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("containerd at %s cannot say which images it has: %w. Start containerd, or name its socket with --address", address, err)
	}
	var errs []error
	for _, space := range spaces {
		ctx := namespaces.WithNamespace(ctx, space)
		list, err := c.ListImages(ctx)
		if err != nil {
			return fmt.Errorf("images in namespace %s: %w", space, err)
		}
		for _, img := range named(list) {
			if lazy, err := img.IsUnpacked(ctx, from); err != nil || !lazy {
				continue // not for this snapshotter, or not for this platform
			}
			err := move(ctx, c, img, to, resolver)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s in namespace %s: %w", img.Name(), space, err))
			}
			done(space, img.Name(), err)
		}
	}
	return errors.Join(errs...)
}

// dial does not wait for a socket that is not there.
func dial(address string) (*containerd.Client, error) {
	if _, err := os.Stat(address); err != nil {
		return nil, err
	}
	return containerd.New(address, containerd.WithTimeout(answer))
}

// Runs says whether the containerd that listens at address has the snapshotter. It has not
// if it does not answer.
func Runs(ctx context.Context, address, snapshotter string) bool {
	c, err := dial(address)
	if err != nil {
		return false
	}
	defer func() { _ = c.Close() }() // nothing is lost by it
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	r, err := c.IntrospectionService().Plugins(ctx, fmt.Sprintf("type==%s,id==%s", plugins.SnapshotPlugin, snapshotter))
	return err == nil && len(r.GetPlugins()) > 0
}

// Users is how many containers of the containerd that listens at address have snapshots of
// the snapshotter, whether they run or not. containerd removes none of them without it.
func Users(ctx context.Context, address, snapshotter string) (n int, err error) {
	c, err := dial(address)
	if err != nil {
		return 0, fmt.Errorf("containerd at %s: %w", address, err)
	}
	defer func() { _ = c.Close() }() // nothing is lost by it
	spaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return 0, fmt.Errorf("containerd at %s cannot say which containers it has: %w", address, err)
	}
	for _, space := range spaces {
		list, err := c.ContainerService().List(namespaces.WithNamespace(ctx, space))
		if err != nil {
			return 0, fmt.Errorf("containers in namespace %s: %w", space, err)
		}
		for _, x := range list {
			if x.Snapshotter == snapshotter {
				n++
			}
		}
	}
	return n, nil
}

// named returns one of all images with the same digest: one whose name says where its
// registry is, if there is one.
func named(list []containerd.Image) []containerd.Image {
	at := map[digest.Digest]int{}
	var out []containerd.Image
	for _, img := range list {
		i, ok := at[img.Target().Digest]
		if !ok {
			at[img.Target().Digest] = len(out)
			out = append(out, img)
		} else if _, err := reference.ParseNamed(out[i].Name()); err != nil {
			out[i] = img
		}
	}
	return out
}

func move(ctx context.Context, c *containerd.Client, img containerd.Image, to string, resolver Resolver) error {
	ctx, release, err := c.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = release(context.WithoutCancel(ctx)) }() // it expires
	r, err := resolver(ctx, img.Name())
	if err != nil {
		return err
	}
	fetcher, err := r.Fetcher(ctx, img.Name())
	if err != nil {
		return err
	}
	store := c.ContentStore()
	// The labels are what keeps layers from containerd's garbage collection.
	children := images.SetChildrenMappedLabels(store, images.FilterPlatforms(images.ChildrenHandler(store), img.Platform()), nil)
	if err := images.Dispatch(ctx, images.Handlers(remotes.FetchHandler(store, fetcher), children), nil, img.Target()); err != nil {
		return fmt.Errorf("fetch: %w", err)
	}
	if err := img.Unpack(ctx, to); err != nil {
		return fmt.Errorf("unpack for %s: %w", to, err)
	}
	return nil
}
