package volume

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/mount"
)

// damaged is told of each chunk of a diff that was found wrong or unreadable on the
// disk, by whichever reader, and is missing since.
func (m *Manager) damaged(id blockdev.Digest) {
	v, err := m.volume(id)
	if err != nil {
		return // it is being removed, or this process ends: the next one sees it
	}
	if v.diff.Completed() {
		m.queues.refetch(v)
		return
	}
	// Never complete, so mounted lazily: once the kernel has forgotten what it read, it
	// asks again, and the chunk is fetched then. Wrong bytes may go to it until the
	// chunk is known to be damaged, and so until now; also to a read under way.
	if v.setStale() {
		m.chores.Run(func() { m.mounts.refresh(v) })
	}
}

// refresh has the kernel forget what it has cached of mounts whose bytes were put
// right beneath them: of the mount that is there, and of those that it has replaced
// and containers still use. Pages that are mapped stay.
func (m *mounter) refresh(v *volume) {
	dir, stale := v.takeStale()
	if !stale || dir == "" {
		return
	}
	dirs := v.mountPoints()
	users, err := mount.Users(filepath.Join(m.root, mountsDir))
	for _, u := range m.users(v, users, dir, false) {
		dirs = append(dirs, u.Dir)
	}
	errs := []error{err}
	for _, d := range dirs {
		errs = append(errs, forget(d))
	}
	m.log.Warn("a mounted layer had damaged bytes, and the kernel reads them again; restart programs that may have read the damaged bytes", "diff", v.id, "error", errors.Join(errs...))
}

// forget drops the pages of all files below dir from the page cache. A container may
// be changing them at the same time, so no path is followed that leads out.
func forget(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }() // nothing was written
	return fs.WalkDir(root.FS(), ".", func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := root.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil // it is not there any more, or something else is
		}
		return errors.Join(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close())
	})
}
