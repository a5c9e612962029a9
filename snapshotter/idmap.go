package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

func idmapLabels(info snapshots.Info) (uidmap, gidmap string) {
	return info.Labels[snapshots.LabelSnapshotUIDMapping], info.Labels[snapshots.LabelSnapshotGIDMapping]
}

// mappedRoot is the host's id of the container's root in a mapping of the form
// "container:host:size,...".
func mappedRoot(mapping string) (int, error) {
	for m := range strings.SplitSeq(mapping, ",") {
		part := strings.Split(m, ":")
		if len(part) != 3 {
			return 0, fmt.Errorf("%q is not container-id:host-id:size", m)
		}
		var n [3]uint64
		for i, p := range part {
			var err error
			if n[i], err = strconv.ParseUint(p, 10, 31); err != nil {
				return 0, err
			}
		}
		if n[0] == 0 && n[2] > 0 {
			return int(n[1]), nil
		}
	}
	return 0, errors.New("nothing is mapped to id 0")
}

// idmap returns id-mapped, read-only clones of lower directories. They belong to
// the snapshot with this id and stay mounted until its directory is removed.
func (s *Snapshotter) idmap(id, uidmap, gidmap string, lowers []string) (_ []string, err error) {
	s.mu.Lock()
	for {
		if _, busy := s.idmapping[id]; !busy {
			break
		}
		s.idmapDone.Wait()
	}
	s.idmapping[id] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.idmapping, id)
		s.idmapDone.Broadcast()
		s.mu.Unlock()
	}()

	dir := s.clones(id)
	clones := make([]string, len(lowers))
	complete := true
	for i, lower := range lowers {
		clones[i] = filepath.Join(dir, strconv.Itoa(i))
		complete = complete && cloned(lower, clones[i])
	}
	if complete {
		return clones, nil
	}
	if err := unmountClones(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unmountClones(dir))
		}
	}()
	userns, err := mount.GetUsernsFD(uidmap, gidmap)
	if err != nil {
		return nil, fmt.Errorf("user namespace for id mapping: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	defer userns.Close()
	for i, lower := range lowers {
		if err := os.MkdirAll(clones[i], 0o700); err != nil {
			return nil, err
		}
		err := mount.IDMapMountWithAttrs(lower, clones[i], int(userns.Fd()), unix.MOUNT_ATTR_RDONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("id-mapped clone of %s (needs Linux 5.19 for block images): %w: %w",
				lower, err, errdefs.ErrFailedPrecondition)
		}
	}
	return clones, nil
}

// cloned reports whether clone is a mount of the file system that lower is on now:
// the data path may have mounted the diff anew since.
func cloned(lower, clone string) bool {
	var a, b unix.Stat_t
	if unix.Stat(lower, &a) != nil || unix.Stat(clone, &b) != nil || a.Dev != b.Dev || a.Ino != b.Ino {
		return false
	}
	mounted, err := mountinfo.Mounted(clone)
	return err == nil && mounted
}

func (s *Snapshotter) clones(id string) string { return filepath.Join(s.dir(id), "i") }

// unmountClones unmounts whatever is mounted on the entries of dir.
func unmountClones(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		// Detached: an overlay that uses the clone has its own hold on it.
		if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return &os.PathError{Op: "unmount", Path: p, Err: err}
		}
	}
	return nil
}
