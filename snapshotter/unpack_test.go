package snapshotter

import (
	"bytes"
	"context"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
)

// applyTar applies a tar as containerd's applier does on Linux.
func applyTar(ctx context.Context, mounts []mount.Mount, layer []byte) error {
	if len(mounts) == 1 && mounts[0].Type == "overlay" {
		var upper string
		var lowers []string
		for _, o := range mounts[0].Options {
			if v, ok := strings.CutPrefix(o, "upperdir="); ok {
				upper = v
			} else if v, ok := strings.CutPrefix(o, "lowerdir="); ok {
				lowers = strings.Split(v, ":")
			}
		}
		_, err := archive.Apply(ctx, upper, bytes.NewReader(layer),
			archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(lowers))
		return err
	}
	return mount.WithTempMount(ctx, mounts, func(root string) error {
		_, err := archive.Apply(ctx, root, bytes.NewReader(layer))
		return err
	})
}
