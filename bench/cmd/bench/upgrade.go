package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// upgradeBars bound the new bytes against the bytes of changed files. redis'
// upgrade changes its config layer alone, which is what 1x means there.
var upgradeBars = map[string]float64{"node-express": 1.4, "python-django": 1.25, "redis": 1}

func upgradeCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "upgrade",
		Short: "New bytes on a node that goes from v1 to v2",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return benchUpgrade(cmd.Context(), o) },
	}
}

func benchUpgrade(ctx context.Context, o *options) (err error) {
	w, err := newWorld(ctx, o, upgradeImages...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	var r report.Report
	for _, image := range upgradeImages {
		if !o.wanted(image) {
			continue
		}
		u, err := w.measureUpgrade(ctx, image)
		if err != nil {
			return fmt.Errorf("%s: %w", image, err)
		}
		say("%s v1 -> v2: %d new bytes and %d of tar headers for the proof, %d bytes in changed files, %d bytes in new layers",
			image, u.fetched, u.headers, u.changed, u.newLayers)
		name, bound := "upgrade v1 -> v2, new bytes against the bytes of changed files: ", u.changed
		if image == "redis" {
			name, bound = "upgrade v1 -> v2, new bytes against the config layer: ", u.newLayers
		}
		r.Add(name+image, "x", report.AtMost, upgradeBars[image], float64(u.fetched)/float64(bound))
	}
	if err := r.Print(os.Stdout); err != nil {
		return err
	}
	return r.Save(o.out, "upgrade")
}

// upgraded is what an upgrade brought, in uncompressed bytes.
type upgraded struct {
	// fetched is new content. headers is the tar headers of new layers, which the
	// proof fetches: neither changed nor newLayers has such in it.
	fetched, headers int64
	changed          int64 // files of v2 whose content no file of v1 has
	newLayers        int64 // layers that v1 has not
}

// measureUpgrade brings v1 and then v2 of an image to a node, all of it.
func (w *world) measureUpgrade(ctx context.Context, image string) (u upgraded, err error) {
	super, err := w.StartSupernode(ctx, w.name("s"), "")
	if err != nil {
		return u, err
	}
	m, err := w.lazy(ctx, super)
	if err != nil {
		return u, err
	}
	const metric = "shoal_node_fetched_bytes_total"
	counted := func() (all, headers float64, err error) {
		all, err = m.node.Metric(ctx, metric)
		headers, herr := m.node.Metric(ctx, metric+`{priority="proof"}`)
		return all, headers, errors.Join(err, herr)
	}
	layers := map[string]bool{}
	var all, headers float64
	for _, tag := range []string{"v1", "v2"} {
		ref := w.ref(image, tag)
		if all, headers, err = counted(); err != nil {
			return u, err
		}
		if _, err := m.pullAndRun(ctx, "shoal", ref, false); err != nil {
			return u, err
		}
		if err := m.node.WaitProven(ctx, ref, 5*time.Minute); err != nil {
			return u, err
		}
		st, err := m.node.Status(ctx)
		if err != nil {
			return u, err
		}
		u.newLayers = 0
		for _, im := range st.Images {
			if im.Ref != ref {
				continue
			}
			for _, l := range im.Layers {
				if !layers[l.DiffID] {
					u.newLayers += l.Size
				}
				layers[l.DiffID] = true
			}
		}
	}
	allAfter, headersAfter, err := counted()
	if err != nil {
		return u, err
	}
	u.headers = int64(headersAfter - headers)
	u.fetched = int64(allAfter-all) - u.headers
	u.changed, err = w.changedBytes(ctx, m, image)
	return u, errors.Join(err, m.stop(), super.Stop())
}

// changedBytes sums the sizes of v2's files whose content no file of v1 has.
func (w *world) changedBytes(ctx context.Context, m *machine, image string) (int64, error) {
	old, err := w.files(ctx, m, w.ref(image, "v1"))
	if err != nil {
		return 0, err
	}
	have := map[string]bool{}
	for _, f := range old {
		have[f.SHA256] = true
	}
	files, err := w.files(ctx, m, w.ref(image, "v2"))
	if err != nil {
		return 0, err
	}
	var n int64
	for _, f := range files {
		if !have[f.SHA256] {
			have[f.SHA256] = true
			n += f.Size
		}
	}
	return n, nil
}

// files lists the regular files of an image that is on the machine.
func (w *world) files(ctx context.Context, m *machine, ref string) ([]lab.File, error) {
	dir := w.Path(w.name("view"))
	if err := os.MkdirAll(filepath.Clean(dir), 0o700); err != nil {
		return nil, err
	}
	unmount, err := m.MountImage(ctx, "shoal", ref, dir)
	if err != nil {
		return nil, err
	}
	files, err := lab.Files(dir)
	return files, errors.Join(err, unmount())
}
