package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
)

// maxOptions is how long overlayfs' options may get, in bytes, once containerd has
// cut the common directory off the lower ones. The kernel takes one page.
const maxOptions = 3800

// create is Prepare and View.
func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	info, err := callersInfo(opts)
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.limit(ctx)
	defer cancel()
	_, unpack := info.Labels[labelRef]
	if unpack {
		if err := s.prepareLazy(ctx, key, parent, info); err != nil {
			return nil, err
		}
	}
	var links []link
	if parent != "" {
		if links, err = s.chain(ctx, parent); err != nil {
			return nil, s.unknown(parent, err)
		}
	}
	// Before the snapshot is made, so that an image that cannot be mounted leaves
	// nothing behind.
	lowers, err := s.lowers(ctx, links)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", key, err)
	}
	sn, err := s.createOrdinary(ctx, kind, key, parent, &info, lowers)
	if err != nil {
		return nil, err
	}
	mounts, err := s.mounts(sn, info, links, lowers)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("snapshot %s: %w", key, err), s.Remove(ctx, key))
	}
	if !unpack {
		s.containerStarts(key, sn.ID, info, links)
	}
	return mounts, nil
}

// createOrdinary makes an active snapshot or a view, with its directories. It
// replaces info by what is stored.
func (s *Snapshotter) createOrdinary(ctx context.Context, kind snapshots.Kind, key, parent string,
	info *snapshots.Info, lowers []string,
) (sn storage.Snapshot, err error) {
	uid, gid, err := owner(*info, lowers)
	if err != nil {
		return sn, err
	}
	// All in the transaction, so that Cleanup, which has one too, sees no directory
	// without its snapshot.
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		sn, err = storage.CreateSnapshot(ctx, kind, key, parent, replace(*info))
		if err != nil {
			return fmt.Errorf("create snapshot: %w", err)
		}
		if _, *info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		return s.claim(sn.ID, func(dir string) error {
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			return makeDirs(dir, kind, uid, gid)
		})
	})
	return sn, err
}

// claim has the directory of a snapshot made, within the transaction that gives
// out its id. If that fails after, the directory stays and is somebody else's to
// claim: the id is given out again.
func (s *Snapshotter) claim(id string, fill func(dir string) error) error {
	dir := s.dir(id)
	if _, err := os.Lstat(dir); err == nil {
		gone, err := s.discard(dir)
		if err != nil {
			return err
		}
		s.removeDir(gone)
	}
	if err := fill(dir); err != nil {
		s.removeDir(dir)
		return err
	}
	return nil
}

// makeDirs makes what containerd's overlayfs snapshotter has in a directory.
func makeDirs(dir string, kind snapshots.Kind, uid, gid int) error {
	upper := filepath.Join(dir, "fs")
	if err := os.Mkdir(upper, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(upper, 0o755); err != nil { // whatever the umask
		return err
	}
	if uid >= 0 {
		if err := os.Lchown(upper, uid, gid); err != nil {
			return err
		}
	}
	if kind != snapshots.KindActive {
		return nil
	}
	return os.Mkdir(filepath.Join(dir, "work"), 0o711)
}

// owner of a new snapshot's root: who is root in the id mapping, else the owner of
// the parent's root; -1: nobody in particular.
func owner(info snapshots.Info, lowers []string) (uid, gid int, err error) {
	uidmap, gidmap := idmapLabels(info)
	if uidmap != "" || gidmap != "" {
		return rootOf(uidmap, gidmap)
	}
	if len(lowers) == 0 {
		return -1, -1, nil
	}
	fi, err := os.Stat(lowers[0])
	if err != nil {
		return -1, -1, fmt.Errorf("parent's root: %w", err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return -1, -1, fmt.Errorf("stat of %s has no owner", lowers[0])
	}
	return int(st.Uid), int(st.Gid), nil
}

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
		} else if lowers, err = s.idmap(sn.ID, uidmap, gidmap, lowers); err != nil {
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
func (s *Snapshotter) shorten(id string, options, lowers []string) ([]string, error) {
	if compacted(options, lowers) <= maxOptions {
		return lowers, nil
	}
	// Made again each time: what is mounted may have moved.
	dir := filepath.Join(s.cfg.Root, "l", id)
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

func unique(ids []blockdev.Digest) []blockdev.Digest {
	seen := make(map[blockdev.Digest]struct{}, len(ids))
	out := ids[:0]
	for _, id := range ids {
		if _, again := seen[id]; !again {
			seen[id] = struct{}{}
			out = append(out, id)
		}
	}
	return out
}
