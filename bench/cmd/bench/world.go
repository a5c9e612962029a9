package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// options are the flags that all subcommands have.
type options struct {
	bin, out string
	runs     int
	images   []string
}

// wanted says whether an image is to be measured.
func (o *options) wanted(image string) bool {
	return len(o.images) == 0 || slices.Contains(o.images, image)
}

// The ten real images (bench/images), and those of them with an upgrade pair.
var (
	allImages     = []string{"debian", "nginx", "redis", "python-django", "node-express", "postgres", "tomcat", "wordpress", "golang", "torch"}
	upgradeImages = []string{"node-express", "python-django", "redis"}
)

// The links of the measurements: the registry is 1 Gbit/s and 10 ms each way
// from the datacenter, the supernode 1 Gbit/s and 0.2 ms there and back.
const (
	registryDelay  = 10 * time.Millisecond
	supernodeDelay = 100 * time.Microsecond
)

// world is a lab with the registry of the real images behind a link.
type world struct {
	*lab.Lab
	registry *lab.Registry
	// link is the way from the datacenter to the registry.
	link *lab.Link
	n    int // how many machines were made
	// unlearned: measure starts without a startup profile, too.
	unlearned bool
}

// buildImages builds those of the images that are not there yet.
func buildImages(ctx context.Context, names ...string) error {
	cmd := exec.CommandContext(ctx, "images/build.sh", names...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("bench/images/build.sh %v: %w (run from the bench directory)", names, err)
	}
	return nil
}

// newWorld starts the registry and the link to it.
func newWorld(ctx context.Context, o *options, images ...string) (*world, error) {
	if err := buildImages(ctx, images...); err != nil {
		return nil, err
	}
	dir, err := lab.ImagesDir()
	if err != nil {
		return nil, err
	}
	return startWorld(ctx, o, filepath.Join(dir, "registry"))
}

func startWorld(ctx context.Context, o *options, storage string) (*world, error) {
	l, err := lab.New(o.bin)
	if err != nil {
		return nil, err
	}
	w := &world{Lab: l}
	if w.registry, err = l.StartRegistry(ctx, "registry", storage, ""); err == nil {
		w.link, err = l.NewLink(w.registry.Addr, lab.Gigabit, registryDelay)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return w, nil
}

// ref is an image's reference by way of the link.
func (w *world) ref(image, tag string) string { return w.link.Addr + "/" + image + ":" + tag }

// name makes a name for the next machine.
func (w *world) name(kind string) string {
	w.n++
	return fmt.Sprintf("%s%d", kind, w.n)
}

// machine is a fresh computer: a containerd, and with a supernode a node.
type machine struct {
	*lab.Containerd
	node *lab.Node
	// link is the way from the supernode to this machine.
	link *lab.Link
}

// plain makes a machine with containerd's own snapshotters alone.
func (w *world) plain(ctx context.Context, snapshotters ...string) (*machine, error) {
	c, err := w.StartContainerd(ctx, w.name("c"), lab.ContainerdOptions{Snapshotters: snapshotters})
	return &machine{Containerd: c}, err
}

// lazy makes a machine with a node behind a link of its own to the supernode. Its
// containerd asks the node's registry mirror first.
func (w *world) lazy(ctx context.Context, s *lab.Supernode) (*machine, error) {
	link, err := w.NewLink(s.HostPort(), lab.Gigabit, supernodeDelay)
	if err != nil {
		return nil, err
	}
	node, err := w.StartNode(ctx, w.name("n"), s.Via(link), "")
	if err != nil {
		return nil, err
	}
	c, err := w.StartContainerd(ctx, w.name("c"), lab.ContainerdOptions{Shoal: node.Socket, Mirror: node.Mirror, MirrorCA: node.MirrorCA})
	return &machine{Containerd: c, node: node, link: link}, err
}

// stop stops a machine, containerd first.
func (m *machine) stop() error {
	err := m.Containerd.Stop()
	if m.node != nil {
		err = errors.Join(err, m.node.Stop(), m.link.Close())
	}
	return err
}

// start is what one pull and one start took.
type start struct {
	pulled, ready time.Duration // ready counts from the beginning of the pull
}

// pullAndRun pulls ref and runs it until READY, or where anyLine is set, until
// it says anything or ends.
func (m *machine) pullAndRun(ctx context.Context, snapshotter, ref string, anyLine bool) (start, error) {
	began := time.Now()
	if err := m.Pull(ctx, snapshotter, ref); err != nil {
		return start{}, err
	}
	s := start{pulled: time.Since(began)}
	ready, err := m.RunReady(ctx, snapshotter, ref, anyLine)
	s.ready = s.pulled + ready
	return s, err
}

// manifest is what the measurements need of an image's manifest.
type manifest struct {
	Config struct{ Digest string }
	Layers []struct {
		Digest string
		Size   int64
	}
}

// compressed is the size of all layers as the registry has them.
func (m *manifest) compressed() int64 {
	var n int64
	for _, l := range m.Layers {
		n += l.Size
	}
	return n
}

const manifestTypes = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"

// manifest reads an image's manifest, not by way of the link.
func (w *world) manifest(ctx context.Context, image, tag string) (*manifest, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+w.registry.Addr+"/v2/"+image+"/manifests/"+tag, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", manifestTypes)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		msg, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, fmt.Errorf("manifest of %s:%s: %s: %s", image, tag, resp.Status, msg)
	}
	var m manifest
	return &m, json.NewDecoder(resp.Body).Decode(&m)
}

// dropCaches empties the page cache, so that reads reach the disk.
func dropCaches() error {
	if err := exec.Command("sync").Run(); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200)
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}
