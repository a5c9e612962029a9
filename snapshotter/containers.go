package snapshotter

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/moby/sys/mountinfo"

	"github.com/shoalfs/shoal/snapshotter/images"
)

// containerOf returns the container of a snapshot on this chain; false: it is none that
// could read from a lazy layer.
func containerOf(key, id string, info snapshots.Info, links []link) (ct images.Container, ok bool) {
	ct = images.Container{Key: key, ID: id, View: info.Kind == snapshots.KindView, Diffs: diffsOf(links)}
	for _, l := range links {
		if ct.Chain = l.chain; ct.Chain != "" {
			break
		}
	}
	return ct, !unpacks(info) && len(ct.Diffs) > 0
}

func (s *Snapshotter) containerStarts(key, id string, info snapshots.Info, links []link) {
	if ct, ok := containerOf(key, id, info, links); ok {
		s.images.ContainerStarts(ct)
	}
}

// containerFound is for a container that an earlier process has known.
func (s *Snapshotter) containerFound(ctx context.Context, key string, info snapshots.Info, links []link) {
	ct, ok := containerOf(key, "", info, links)
	if !ok {
		return
	}
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		ct.ID, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err == nil { // else removed meanwhile
		s.images.ContainerFound(ct)
	}
}

// escapeOption writes a path as the kernel does in the options of a mount.
func escapeOption(path string) string {
	var b strings.Builder
	for _, c := range []byte(path) {
		if strings.IndexByte(", \t\n\\", c) >= 0 {
			fmt.Fprintf(&b, "\\%03o", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// Mounted returns the ids of the snapshots that are the upper directory of an overlay;
// nil: the mounts cannot be read.
func (m *metaStore) Mounted() map[string]struct{} {
	prefix := escapeOption(filepath.Join(m.root, "s") + string(filepath.Separator))
	ids := make(map[string]struct{})
	_, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		if i.FSType != "overlay" {
			return true, false
		}
		for option := range strings.SplitSeq(i.VFSOptions, ",") {
			if upper, ok := strings.CutPrefix(option, "upperdir="+prefix); ok {
				id, _, _ := strings.Cut(upper, string(filepath.Separator))
				ids[id] = struct{}{}
			}
		}
		return true, false
	})
	if err != nil {
		return nil
	}
	return ids
}
