package snapshotter

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ctdmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/blockdevtest"
	"github.com/shoalfs/shoal/blockdev/index"
	blocklayer "github.com/shoalfs/shoal/blockdev/layer"
	"github.com/shoalfs/shoal/blockdev/mount"
	"github.com/shoalfs/shoal/blockdev/volume"
)

// volumes is a data path as nodes have it, and what its bytes come from.
type volumes struct {
	*volume.Manager
	t    *testing.T
	cfg  volume.Config
	src  blockdevtest.Memory
	away atomic.Bool // src has no bytes
}

// newVolumes opens a data path that soon takes away what it has mounted again elsewhere.
func newVolumes(t *testing.T) *volumes {
	t.Helper()
	needRoot(t)
	needFUSE(t)
	v := &volumes{t: t, cfg: volume.Config{
		Root: filepath.Join(t.TempDir(), "volumes"), ReadTimeout: time.Minute, RetireAfter: 10 * time.Millisecond,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}}
	v.open()
	t.Cleanup(func() {
		check(t, v.Close())
		left := must(mount.List(v.cfg.Root))(t)
		for i := range left {
			check(t, mount.Detach(left[len(left)-1-i].Dir))
		}
	})
	return v
}

func (v *volumes) open() {
	v.t.Helper()
	v.Manager = must(volume.Open(bg, v.cfg))(v.t)
	check(v.t, v.Attach(volume.Upstream{Source: blockdevtest.SourceFunc(v.fetch)}))
}

func (v *volumes) fetch(ctx context.Context, req blockdev.Request, deliver blockdev.Deliver) error {
	if v.away.Load() {
		return fmt.Errorf("nothing yet: %w", blockdev.ErrUnavailable)
	}
	return v.src.Fetch(ctx, req, deliver)
}

// add gives a layer the index that a supernode makes of it, and the source its chunks.
func (v *volumes) add(l layer) layer {
	v.t.Helper()
	put := func(_ context.Context, _ blockdev.Digest, data []byte) error {
		v.src.Put(data)
		return nil
	}
	ix := must(blocklayer.Build(bg, strings.NewReader(string(l.tar)), put, blocklayer.Options{}))(v.t)
	l.index = must(index.Encode(ix))(v.t)
	return l
}

// shown returns where the block images are that containerd did not get for itself.
func (v *volumes) shown() (dirs []string) {
	v.t.Helper()
	for _, i := range must(mount.List(filepath.Join(v.cfg.Root, "m")))(v.t) {
		dirs = append(dirs, i.Dir)
	}
	return dirs
}

// clones are the block images below the snapshots' directories.
func (n *node) clones() []mount.Info {
	n.t.Helper()
	return must(mount.List(filepath.Join(n.root, "s")))(n.t)
}

// TestUnpackOnLayerThatCompletes: containerd looks at the layers below the one that it
// unpacks for as long as its download takes. These are still where Prepare said when one of
// them has become complete, and is mounted elsewhere since; also after a restart that has
// lost the FUSE connection.
func TestUnpackOnLayerThatCompletes(t *testing.T) {
	for name, end := range map[string]func(n *node, key string, opt snapshots.Opt) error{
		"commit": func(n *node, key string, opt snapshots.Opt) error { return n.Commit(bg, "top", key, opt) },
		"remove": func(n *node, key string, _ snapshots.Opt) error {
			if err := n.Remove(bg, key); err != nil {
				return err
			}
			return n.Cleanup(bg)
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVolumes(t)
			v.away.Store(true)
			useVolumes := func(c *nodeConfig) { c.Data = v }
			n := newNode(t, useVolumes)
			base := newImage("registry.test/b:1", v.add(newLayer(t, dir("d", 0o1777, owned(2, 3)), file("d/a"))))
			img := newImage("registry.test/i:1", base.layers[0], newLayer(t, file("d/b")))
			n.images.publish(base)
			top, fetched, err := n.pull(bg, base)
			check(t, err)
			if len(fetched) != 0 {
				t.Fatalf("the base is not lazy: %s", n.log.lines())
			}
			lazy := v.shown()
			opt := snapshots.WithLabels(map[string]string{labelRef: img.chain(1)})
			mounts := must(n.Prepare(bg, "k", top, opt))(t)

			v.away.Store(false)
			check(t, v.PrefetchWait(bg, base.layers[0].diffID, nil))
			waitFor(t, "the lazy mount is gone", func() bool {
				now := v.shown()
				return len(now) == 1 && now[0] != lazy[0]
			})
			whole(t, mounts)
			must(n.Mounts(bg, "k"))(t) // another caller that asks takes nothing from the first
			whole(t, mounts)
			check(t, n.Close())
			check(t, v.Close())
			v.open()
			n.start(useVolumes)
			whole(t, mounts)
			check(t, applyTar(bg, mounts, img.layers[1].tar))

			check(t, end(n, "k", opt))
			if left := n.clones(); len(left) != 0 {
				t.Errorf("still mounted: %+v", left)
			}
			if name == "remove" {
				return
			}
			tree := describe(t, mounted(t, must(n.Prepare(bg, "c", "top"))(t)))
			if !strings.HasPrefix(tree["d"], "41777 2:3") || tree["d/b"] == "" {
				t.Errorf("tree: %v", tree)
			}
			if left := n.clones(); len(left) != 0 {
				t.Errorf("mounted for a container: %+v", left)
			}
		})
	}
}

// whole checks the lower layer of TestUnpackOnLayerThatCompletes, as a program sees it that
// mounts what Prepare has said.
func whole(t *testing.T, mounts []ctdmount.Mount) {
	t.Helper()
	check(t, ctdmount.WithTempMount(bg, mounts, func(root string) error {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, "d"), &st); err != nil || st.Mode != unix.S_IFDIR|0o1777 || st.Uid != 2 {
			t.Errorf("d has mode %o and belongs to %d: %v", st.Mode, st.Uid, err)
		}
		return nil
	}))
}
