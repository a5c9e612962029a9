package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/shoalfs/shoal/blockdev"
)

// create is Prepare and View.
func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	info, err := callersInfo(opts)
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.limit(ctx)
	defer cancel()
	unpack := unpacks(info)
	if unpack {
		if err := s.prepareLazy(ctx, key, parent, info); err != nil {
			return nil, err
		}
	}
	if err := s.emptyVolume(key, parent); err != nil {
		return nil, err
	}
	var links []link
	if parent != "" {
		if links, err = s.meta.chain(ctx, parent); err != nil {
			return nil, s.unknown.explain(parent, err)
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

// emptyVolume refuses the snapshot of a pod's image volume if it has no parent. containerd
// has unpacked nothing of such an image, and goes on without a word: the container would
// start and find no file.
func (s *Snapshotter) emptyVolume(key, parent string) error {
	// CRI's key is a path, .../image-volumes/POD/MANIFEST; that of a container is not.
	dir, manifest := filepath.Split(key)
	_, ok := blockdev.ParseHex(manifest)
	if parent != "" || !ok || filepath.Base(filepath.Dir(filepath.Clean(dir))) != "image-volumes" {
		return nil
	}
	s.log.Warn("the image of a volume has no layers; its container does not start", "manifest", "sha256:"+manifest)
	return fmt.Errorf("containerd has unpacked no layer of the image with the manifest sha256:%s, so the volume would be empty: "+
		"it is an artifact, or its blobs are not tar layers; make a container image of its files: %w", manifest, errdefs.ErrFailedPrecondition)
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
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
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

// owner of a new snapshot's root: the user that is root in the id mapping, else the owner of
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
