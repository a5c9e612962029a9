package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// The image whose biggest file is read, and the one that is read whole.
const (
	bigFileImage = "torch"
	treeImage    = "python-django"
)

func readCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "read",
		Short: "Reading complete images, page cache dropped, against overlayfs and containerd's erofs",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return benchRead(cmd.Context(), o) },
	}
}

// view is one image mounted in one way.
type view struct {
	kind string // overlayfs, erofs, lazy or native
	dir  string
	undo func() error
}

func benchRead(ctx context.Context, o *options) (err error) {
	w, err := newWorld(ctx, o, bigFileImage, treeImage)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	others, err := w.plain(ctx)
	if err != nil {
		return err
	}
	super, err := w.StartSupernode(ctx, w.name("s"), "")
	if err != nil {
		return err
	}
	node, lazy, err := w.complete(ctx, super)
	if err != nil {
		return err
	}
	began, err := readProcessorTime()
	if err != nil {
		return err
	}
	var r report.Report
	big, err := w.views(ctx, others, node, bigFileImage, lazy)
	if err != nil {
		return err
	}
	speed, err := measureViews(o.runs, big, "MB/s", biggestFile)
	if err != nil {
		return err
	}
	r.Add("sequential read of a big file, mounted lazily, against overlayfs", "x", report.AtLeast, 0.7, divide(speed["lazy"], speed["overlayfs"])...)
	r.Add("sequential read of a big file, mounted natively, against containerd's erofs", "x", report.AtLeast, 0.9, divide(speed["native"], speed["erofs"])...)
	trees, err := w.views(ctx, others, node, treeImage, lazy)
	if err != nil {
		return err
	}
	took, err := measureViews(o.runs, trees, "s", readAll)
	if err != nil {
		return err
	}
	r.Add("find | xargs cat of a complete image, mounted natively, against overlayfs", "x", report.AtMost, 0.8, divide(took["native"], took["overlayfs"])...)
	r.Add("find | xargs cat of a complete image, mounted lazily, against overlayfs", "x", report.AtMost, 1.1, divide(took["lazy"], took["overlayfs"])...)
	rss, _, err := node.node.RSS()
	if err != nil {
		return err
	}
	r.Add("node RSS, torch fully prefetched", "MiB", report.AtMost, 150, float64(rss)/(1<<20))
	for _, v := range append(big, trees...) {
		if err := v.undo(); err != nil {
			return err
		}
	}
	if err := began.noteStolen(&r); err != nil {
		return err
	}
	if err := r.Print(os.Stdout); err != nil {
		return err
	}
	return r.Save(o.out, "read")
}

// views mounts an image in all four ways; lazy are the directories where images were
// mounted before they were complete.
func (w *world) views(ctx context.Context, others, node *machine, image string, lazy map[string]string) ([]view, error) {
	views := []view{{"lazy", lazy[image], func() error { return nil }}}
	for _, v := range []struct {
		kind, snapshotter string
		m                 *machine
	}{{"overlayfs", "overlayfs", others}, {"native", "shoal", node}} {
		ref := w.ref(image, "v1")
		if v.m == others {
			if err := v.m.Pull(ctx, v.snapshotter, ref); err != nil {
				return nil, err
			}
		}
		dir, undo, err := w.mount(ctx, v.m, v.snapshotter, image, v.kind)
		if err != nil {
			return nil, err
		}
		views = append(views, view{v.kind, dir, undo})
	}
	erofs, err := w.erofsView(ctx, image)
	return append(views, erofs), err
}

// erofsView mounts an image that containerd's own erofs snapshotter unpacked. It
// mounts the layers itself, since `ctr images mount` makes containerd 2.2 panic
// with that snapshotter. The machine is a fresh one, so that its snapshots are
// the image's, numbered from the bottom.
func (w *world) erofsView(ctx context.Context, image string) (view, error) {
	m, err := w.plain(ctx, "erofs")
	if err != nil {
		return view{}, err
	}
	if err := m.Pull(ctx, "erofs", w.ref(image, "v1")); err != nil {
		return view{}, err
	}
	layers, err := filepath.Glob(filepath.Join(m.Root, "io.containerd.snapshotter.v1.erofs", "snapshots", "*", "layer.erofs"))
	if err != nil {
		return view{}, err
	}
	var lowers []string
	for i := len(layers); i >= 1; i-- {
		dir := w.Path(w.name("e"))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return view{}, err
		}
		layer := filepath.Join(m.Root, "io.containerd.snapshotter.v1.erofs", "snapshots", fmt.Sprint(i), "layer.erofs")
		if err := unix.Mount(layer, dir, "erofs", unix.MS_RDONLY, ""); err != nil {
			return view{}, fmt.Errorf("mount %s: %w", layer, err)
		}
		lowers = append(lowers, dir)
	}
	dir := w.Path(w.name("erofs"))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return view{}, err
	}
	if err := unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lowers, ":")); err != nil {
		return view{}, fmt.Errorf("overlay of erofs layers: %w", err)
	}
	// What is mounted below the lab's directory goes with the lab.
	return view{"erofs", dir, func() error { return nil }}, nil
}

// mount mounts an image that m has pulled on a new directory.
func (w *world) mount(ctx context.Context, m *machine, snapshotter, image, kind string) (dir string, undo func() error, err error) {
	dir = w.Path(w.name(kind))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", nil, err
	}
	undo, err = m.MountImage(ctx, snapshotter, w.ref(image, "v1"), dir)
	return dir, undo, err
}

// complete makes a machine that has every byte of both images, and returns where they
// were mounted before. These mounts read through FUSE as long as they last; those that
// are made from then on do not.
func (w *world) complete(ctx context.Context, super *lab.Supernode) (m *machine, lazy map[string]string, err error) {
	if m, err = w.lazy(ctx, super); err != nil {
		return nil, nil, err
	}
	lazy = make(map[string]string)
	for _, image := range []string{bigFileImage, treeImage} {
		if err := m.Pull(ctx, "shoal", w.ref(image, "v1")); err != nil {
			return nil, nil, err
		}
		// Gone with the lab.
		if lazy[image], _, err = w.mount(ctx, m, "shoal", image, "lazy"); err != nil {
			return nil, nil, err
		}
	}
	for _, image := range []string{bigFileImage, treeImage} {
		ref := w.ref(image, "v1")
		if _, err := m.RunReady(ctx, "shoal", ref, false); err != nil {
			return nil, nil, err
		}
		if err := m.node.WaitLocal(ctx, ref, 10*time.Minute); err != nil {
			return nil, nil, err
		}
	}
	n, err := m.node.Metric(ctx, `shoal_node_lazy_mounts{users="containers"}`)
	if err == nil && n == 0 {
		err = errors.New("no layer is read through FUSE by what was mounted before the images were complete")
	}
	return m, lazy, err
}

// measureViews measures each view in turn, runs times, page cache dropped.
func measureViews(runs int, views []view, unit string, measure func(dir string) (float64, error)) (map[string][]float64, error) {
	samples := map[string][]float64{}
	for range runs {
		for _, v := range views {
			if err := dropCaches(); err != nil {
				return nil, err
			}
			x, err := measure(v.dir)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", v.kind, err)
			}
			say("%-10s %.4g %s", v.kind, x, unit)
			samples[v.kind] = append(samples[v.kind], x)
		}
	}
	return samples, nil
}

// biggestFile reads a tree's biggest file and returns MB/s.
func biggestFile(dir string) (float64, error) {
	var name string
	var size int64
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() > size {
			name, size = path, info.Size()
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	began := time.Now()
	// A plain buffer: io.Discard alone would read in small steps.
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
	if err != nil {
		return 0, err
	}
	if n != size {
		return 0, fmt.Errorf("%s: read %d bytes of %d", name, n, size)
	}
	return float64(n) / 1e6 / time.Since(began).Seconds(), nil
}

// readAll reads every file of a tree and returns seconds.
func readAll(dir string) (float64, error) {
	began := time.Now()
	out, err := exec.Command("sh", "-c", `find "$1" -type f -print0 | xargs -0 cat | wc -c`, "sh", dir).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("%w: %s", err, out)
	}
	return time.Since(began).Seconds(), nil
}

func divide(a, b []float64) []float64 {
	q := make([]float64, len(a))
	for i := range a {
		q[i] = a[i] / b[i]
	}
	return q
}
