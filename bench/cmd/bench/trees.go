package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/integration/lab"
)

func treesCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "trees",
		Short: "Compare each real image, mounted by shoal, with containerd's overlayfs, entry by entry",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return compareTrees(cmd.Context(), o) },
	}
}

func compareTrees(ctx context.Context, o *options) (err error) {
	w, err := newWorld(ctx, o, "public")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	super, err := w.StartSupernode(ctx, w.name("s"), "")
	if err != nil {
		return err
	}
	m, err := w.lazy(ctx, super)
	if err != nil {
		return err
	}
	var failed []string
	for _, image := range allImages {
		if !o.wanted(image) {
			continue
		}
		// Straight from the registry: this is about trees, not about time.
		ref := w.registry.Addr + "/" + image + ":v1"
		var dirs []string
		var undo []func() error
		for _, snapshotter := range []string{"overlayfs", "shoal"} {
			if err := m.Pull(ctx, snapshotter, ref); err != nil {
				return err
			}
			dir := w.Path(w.name(snapshotter))
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			unmount, err := m.MountImage(ctx, snapshotter, ref, dir)
			if err != nil {
				return err
			}
			dirs, undo = append(dirs, dir), append(undo, unmount)
		}
		diffs, err := lab.Differences(dirs[0], dirs[1], nil)
		if err := errors.Join(err, undo[0](), undo[1]()); err != nil {
			return err
		}
		if len(diffs) > 0 {
			failed = append(failed, image)
			say("%s: overlayfs and shoal differ:\n%s", image, strings.Join(diffs, "\n"))
			continue
		}
		say("%s: equal", image)
	}
	if len(failed) > 0 {
		return fmt.Errorf("these images differ: %s", strings.Join(failed, ", "))
	}
	return nil
}
