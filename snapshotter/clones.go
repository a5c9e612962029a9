package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// clones makes mounts of lower directories that belong to one snapshot: in its directory,
// where they stay, also without this process, until it is committed or its directory is
// removed.
type clones struct {
	dirs
	mu   sync.Mutex
	busy map[string]struct{} // snapshot ids whose clones are being made or dropped
	done *sync.Cond          // on mu
}

func newClones(d dirs) *clones {
	c := &clones{dirs: d, busy: make(map[string]struct{})}
	c.done = sync.NewCond(&c.mu)
	return c
}

// enter waits until no other caller works on the clones of a snapshot. The caller calls
// leave.
func (c *clones) enter(id string) (leave func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if _, busy := c.busy[id]; !busy {
			break
		}
		c.done.Wait()
	}
	c.busy[id] = struct{}{}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.busy, id)
		c.done.Broadcast()
	}
}

// pin returns lower directories with clones instead of the block images among them.
//
// containerd looks into the lower directories of a layer that it unpacks when it has
// downloaded the layer, which may take hours, by the paths that Prepare has returned: for the
// attributes of directories that the layer has no entry for. If a path is not there any more,
// then it gives such a directory other attributes, and no error. The data path unmounts what
// it has replaced some minutes ago, as it does when a diff has become complete. A clone stays,
// and shows all attributes even if its process has ended.
func (c *clones) pin(id string, lowers []string) ([]string, error) {
	var at []int
	var images []string
	for i, lower := range lowers {
		if !strings.HasPrefix(lower, c.dir("")+string(filepath.Separator)) {
			at, images = append(at, i), append(images, lower)
		}
	}
	pinned := slices.Clone(lowers)
	made, err := c.make(id, images, func(_, clone string) bool { return isMounted(clone) }, func(lower, clone string) error {
		if err := unix.Mount(lower, clone, "", unix.MS_BIND, ""); err != nil {
			return &os.PathError{Op: "bind mount", Path: lower, Err: err}
		}
		return nil
	})
	for k, clone := range made {
		pinned[at[k]] = clone
	}
	return pinned, err
}

// idmap returns id-mapped, read-only clones of all lower directories.
func (c *clones) idmap(id, uidmap, gidmap string, lowers []string) ([]string, error) {
	var userns *os.File
	defer func() {
		if userns != nil {
			_ = userns.Close() // only a handle
		}
	}()
	return c.make(id, lowers, same, func(lower, clone string) (err error) {
		if userns == nil {
			if userns, err = mount.GetUsernsFD(uidmap, gidmap); err != nil {
				return fmt.Errorf("user namespace for id mapping: %w: %w", err, errdefs.ErrFailedPrecondition)
			}
		}
		if err := mount.IDMapMountWithAttrs(lower, clone, int(userns.Fd()), unix.MOUNT_ATTR_RDONLY, 0); err != nil {
			return fmt.Errorf("id-mapped clone of %s (needs Linux 5.19 for block images): %w: %w",
				lower, err, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
}

// make makes clones, all of them unless each one that is there is good.
func (c *clones) make(id string, lowers []string, good func(lower, clone string) bool, attach func(lower, clone string) error) (_ []string, err error) {
	defer c.enter(id)()
	dir := c.clones(id)
	made := make([]string, len(lowers))
	complete := true
	for i, lower := range lowers {
		made[i] = filepath.Join(dir, strconv.Itoa(i))
		complete = complete && good(lower, made[i])
	}
	if complete {
		return made, nil
	}
	if err := unmountClones(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unmountClones(dir))
		}
	}()
	for i, lower := range lowers {
		if err := os.MkdirAll(made[i], 0o700); err != nil {
			return nil, err
		}
		if err := attach(lower, made[i]); err != nil {
			return nil, err
		}
	}
	return made, nil
}

// drop ends the clones of a snapshot, except for mounts that were made of them.
func (c *clones) drop(id string) error {
	defer c.enter(id)()
	return unmountClones(c.clones(id))
}

// same reports whether clone is a mount of the file system that lower is on now:
// the data path may have mounted the diff again since.
func same(lower, clone string) bool {
	var a, b unix.Stat_t
	return unix.Stat(lower, &a) == nil && unix.Stat(clone, &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino && isMounted(clone)
}

func isMounted(dir string) bool {
	mounted, err := mountinfo.Mounted(dir)
	return err == nil && mounted
}

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
		_ = os.Remove(p) // if that fails, then it goes with the snapshot
	}
	_ = os.Remove(dir)
	return nil
}
