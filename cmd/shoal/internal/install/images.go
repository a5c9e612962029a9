package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/api/services/introspection/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Resolver returns how the registry of an image is asked.
type Resolver func(ctx context.Context, image string) (remotes.Resolver, error)

// answer is how long containerd has for the answer to a short question.
const answer = 10 * time.Second

// ErrSilent is the cause of an error if containerd accepts a connection and does not
// answer.
var ErrSilent = errors.New("did not answer")

// MoveImages fetches the layers of every image that containerd, which listens at address,
// has lazily, and unpacks the images for the snapshotter to. The images' names and digests
// stay what they are, and so does what shoal has of them. done is called after each image.
// MoveImages goes on after a failure; the error names all images that could not be moved.
// It wraps ErrSilent if containerd hangs.
func MoveImages(ctx context.Context, address, from, to string, resolver Resolver, done func(namespace, image string, err error)) error {
	return moveImages(ctx, answer, address, from, to, resolver, done)
}

func moveImages(ctx context.Context, limit time.Duration, address, from, to string, resolver Resolver, done func(namespace, image string, err error)) error {
	c, err := dial(address, limit)
	if err != nil {
		return fmt.Errorf("containerd at %s: %w. Start containerd, or name its socket with --address", address, err)
	}
	defer func() { _ = c.Close() }() // nothing is lost by it
	spaces, err := ask(ctx, c, c.NamespaceService().List)
	if errors.Is(err, ErrSilent) {
		return err
	}
	if err != nil {
		return fmt.Errorf("containerd at %s cannot say which images it has: %w. Start containerd, or name its socket with --address", address, err)
	}
	var errs []error
	for _, space := range spaces {
		ctx := namespaces.WithNamespace(ctx, space)
		list, err := ask(ctx, c, func(ctx context.Context) ([]containerd.Image, error) { return c.ListImages(ctx) })
		if err != nil {
			return fmt.Errorf("images in namespace %s: %w", space, err)
		}
		for _, img := range named(list) {
			lazy, err := ask(ctx, c, func(ctx context.Context) (bool, error) { return img.IsUnpacked(ctx, from) })
			if errors.Is(err, ErrSilent) {
				return fmt.Errorf("%w. To answer, containerd asks shoal: if the node is stopped, then start it before that", err) // the image may be lazy
			}
			if err != nil || !lazy {
				continue // not for this snapshotter, or not for this platform
			}
			err = move(ctx, c.Client, img, to, resolver)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s in namespace %s: %w", img.Name(), space, err))
			}
			done(space, img.Name(), err)
		}
	}
	return errors.Join(errs...)
}

// client is a connection to containerd.
type client struct {
	*containerd.Client
	address string
	limit   time.Duration // for an answer
}

// dial does not wait for a socket that is not there.
func dial(address string, limit time.Duration) (*client, error) {
	if _, err := os.Stat(address); err != nil {
		return nil, err
	}
	// It connects with the first question, which has the shorter limit.
	c, err := containerd.New(address, containerd.WithTimeout(2*limit))
	return &client{c, address, limit}, err
}

// ask asks containerd a short question. The error wraps ErrSilent if the time for the
// answer is over, and ctx goes on.
func ask[T any](ctx context.Context, c *client, question func(context.Context) (T, error)) (T, error) {
	limited, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	v, err := question(limited)
	// containerd has the limit, too, and may notice it first.
	over := limited.Err() != nil || errors.Is(err, context.DeadlineExceeded)
	if err != nil && over && ctx.Err() == nil {
		err = fmt.Errorf("containerd at %s %w within %v: %w. Restart containerd (containers go on running), and run this command again", c.address, ErrSilent, c.limit, err)
	}
	return v, err
}

// Runs says whether the containerd that listens at address has the snapshotter. The error
// says that it does not answer, or not yet.
func Runs(ctx context.Context, address, snapshotter string) (bool, error) {
	c, err := dial(address, answer)
	if err != nil {
		return false, fmt.Errorf("containerd at %s: %w", address, err)
	}
	defer func() { _ = c.Close() }() // nothing is lost by it
	r, err := ask(ctx, c, func(ctx context.Context) (*introspection.PluginsResponse, error) {
		return c.IntrospectionService().Plugins(ctx, fmt.Sprintf("type==%s,id==%s", plugins.SnapshotPlugin, snapshotter))
	})
	return len(r.GetPlugins()) > 0, err
}

// Users is how many containers of the containerd that listens at address have snapshots of
// the snapshotter, whether they run or not. containerd removes none of them without it. The
// error wraps ErrSilent if containerd hangs.
func Users(ctx context.Context, address, snapshotter string) (n int, err error) {
	return users(ctx, answer, address, snapshotter)
}

func users(ctx context.Context, limit time.Duration, address, snapshotter string) (n int, err error) {
	c, err := dial(address, limit)
	if err != nil {
		return 0, fmt.Errorf("containerd at %s: %w", address, err)
	}
	defer func() { _ = c.Close() }() // nothing is lost by it
	spaces, err := ask(ctx, c, c.NamespaceService().List)
	if errors.Is(err, ErrSilent) {
		return 0, err
	}
	if err != nil {
		return 0, fmt.Errorf("containerd at %s cannot say which containers it has: %w. Start containerd, or name its socket with --address", address, err)
	}
	for _, space := range spaces {
		ctx := namespaces.WithNamespace(ctx, space)
		list, err := ask(ctx, c, func(ctx context.Context) ([]containers.Container, error) { return c.ContainerService().List(ctx) })
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
