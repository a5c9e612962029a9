package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// maxOptions is how long overlayfs' options may get, in bytes, once containerd has
// cut the common directory off the lower ones. The kernel takes one page.
const maxOptions = 3800

// mounts describes a snapshot to containerd, as its overlayfs snapshotter does,
// but for id mappings: containerd would clone the directory that holds all lower
// ones, without what is mounted in it, so block images would come out empty; and
// versions before 2.0 know no such option. So lower directories come id-mapped.
// The upper one needs no mapping: what a container writes there has the host's ids.
func (s *Snapshotter) mounts(sn storage.Snapshot, info snapshots.Info, links []link, lowers []string) ([]mount.Mount, error) {
	if uidmap, gidmap := idmapLabels(info); len(lowers) > 0 && (uidmap != "" || gidmap != "") {
		done, err := remapped(links, lowers, uidmap, gidmap)
		if err != nil {
			return nil, err
		}
		if done {
			s.explainRemapped(info.Name)
		} else if lowers, err = s.clones.idmap(sn.ID, uidmap, gidmap, lowers); err != nil {
			return nil, err
		}
	} else if unpacks(info) {
		var err error
		if lowers, err = s.clones.pin(sn.ID, lowers); err != nil {
			return nil, err
		}
	}
	var options []string
	bind := func(source, mode string) []mount.Mount {
		return []mount.Mount{{Type: "bind", Source: source, Options: []string{mode, "rbind"}}}
	}
	switch {
	case len(lowers) == 0 && sn.Kind == snapshots.KindView:
		return bind(s.upper(sn.ID), "ro"), nil
	case len(lowers) == 0:
		return bind(s.upper(sn.ID), "rw"), nil
	case len(lowers) == 1 && sn.Kind == snapshots.KindView:
		return bind(lowers[0], "ro"), nil
	}
	if sn.Kind == snapshots.KindActive {
		options = append(options, "workdir="+s.work(sn.ID), "upperdir="+s.upper(sn.ID))
	}
	options = append(options, s.options...)
	lowers, err := s.shorten(sn.ID, options, lowers)
	if err != nil {
		return nil, err
	}
	options = append(options, "lowerdir="+strings.Join(lowers, ":"))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}, nil
}

// shorten replaces lower directories by symbolic links in one short directory if
// the options would not fit in a page. The links belong to the snapshot with this
// id, and go with it.
func (d dirs) shorten(id string, options, lowers []string) ([]string, error) {
	if compacted(options, lowers) <= maxOptions {
		return lowers, nil
	}
	// Made again each time: what is mounted may have moved.
	dir := d.links(id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	short := make([]string, len(lowers))
	for i, target := range lowers {
		short[i] = filepath.Join(dir, fmt.Sprint(i))
		if old, err := os.Readlink(short[i]); err == nil && old == target {
			continue
		}
		if err := os.Remove(short[i]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if err := os.Symlink(target, short[i]); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, err
		}
	}
	if n := compacted(options, short); n > maxOptions {
		return nil, fmt.Errorf("%d lower directories need %d bytes of mount options, the kernel takes a page: %w",
			len(lowers), n, errdefs.ErrFailedPrecondition)
	}
	return short, nil
}

// compacted is the length of the options as containerd passes them to the kernel:
// with the directory that all lower ones have in common cut off.
func compacted(options, lowers []string) int {
	n := len("lowerdir=")
	for _, o := range options {
		n += len(o) + 1
	}
	common := lowers[0]
	for _, l := range lowers[1:] {
		for !strings.HasPrefix(l, common) {
			common = common[:len(common)-1]
		}
	}
	common = path.Dir(common)
	for _, l := range lowers {
		n += len(l) + 1
		if len(lowers) > 1 && common != "/" && common != "." {
			n -= len(common) + 1
		}
	}
	return n
}
