package volume

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/fusefs"
	"github.com/shoalfs/shoal/blockdev/mount"
)

// leftMounts lists the mounts that an earlier process left.
func leftMounts(root string) (found []mount.Info, err error) {
	for _, sub := range []string{fuseDir, mountsDir} {
		in, err := mount.List(filepath.Join(root, sub))
		if err != nil {
			return nil, err
		}
		found = append(found, in...)
	}
	return found, nil
}

// leftMount is a mount that an earlier process left.
type leftMount struct {
	dir, meta string // mount point, metadata image
	lazy      bool
}

// takeOver goes through these mounts. Those through FUSE stay if its connection
// is adopted. It returns the volumes that were mounted and are to be mounted
// again.
func (m *Manager) takeOver(found []mount.Info, adopted bool) (again []*volume, err error) {
	lost := 0
	// What is over the FUSE mount goes before it.
	for _, i := range slices.Backward(found) {
		if i.Type == fusefs.FSType && adopted {
			continue
		}
		if i.Type != fusefs.FSType && m.leave(i, adopted) {
			continue
		}
		v := m.source(i)
		if i.Type == fusefs.FSType || v == nil {
			// Nobody serves it, since the cache's lock is ours. So it is not
			// touched but to detach it.
			if err := mount.Detach(i.Dir); err != nil {
				return nil, err
			}
			continue
		}
		dir, _, _ := v.mounted()
		lazy := m.marked(v.id)
		if dir == "" && m.usable(v, i, lazy, adopted) {
			m.setName(i.Dir, v.id)
			v.setMounted(i.Dir, i.Source, lazy)
			continue
		}
		if lazy {
			lost++
		}
		if err := mount.Detach(i.Dir); err != nil {
			return nil, err
		}
		if dir == "" && !slices.Contains(again, v) {
			// Where it was is where containerd may have been told that it is.
			m.setName(i.Dir, v.id)
			again = append(again, v)
		}
	}
	if lost > 0 {
		m.cfg.Log.Error("cannot take over lazy mounts of the last process; they are made again, and containers that run on them get I/O errors until you restart the containers",
			"mounts", lost)
	}
	return again, nil
}

// usable reports whether a mount that an earlier process left can stay.
func (m *Manager) usable(v *volume, i mount.Info, lazy, adopted bool) bool {
	if !lazy {
		// If it was complete and is not, that mount is as good as any to those who have
		// it, and gets its bytes back beneath.
		return v.diff.Completed()
	}
	if adopted {
		return true
	}
	// Loop devices can do without the connection that is lost, if all is here.
	return i.Kind == mount.Loop && v.diff.Complete() && switchLoop(m.fusePath(v.id), v.diff.DataPath()) == nil
}

// leave keeps a mount for when its diff, which cannot be opened now, can be.
func (m *Manager) leave(i mount.Info, adopted bool) bool {
	if i.Kind == 0 || filepath.Dir(i.Dir) != filepath.Join(m.root, mountsDir) {
		return false
	}
	for _, id := range m.cache.Known() {
		if filepath.Join(m.root, "diffs", id.Hex()) != filepath.Dir(i.Source) {
			continue
		}
		lazy := m.marked(id)
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.vols[id] != nil || lazy && !adopted {
			return false
		}
		m.names[filepath.Base(i.Dir)] = id
		m.left[id] = leftMount{i.Dir, i.Source, lazy}
		return true
	}
	return false
}

// setName notes that the mount point dir is a diff's.
func (m *Manager) setName(dir string, id blockdev.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.names[filepath.Base(dir)] = id
}

// source returns the volume that a mount shows, or nil if it is no mount of a
// diff that is there, at a place where a diff can be.
func (m *Manager) source(i mount.Info) *volume {
	if i.Kind == 0 || filepath.Dir(i.Dir) != filepath.Join(m.root, mountsDir) {
		return nil
	}
	for _, v := range m.volumes() {
		// Of one diff there may have been two metadata images, in one directory.
		if filepath.Dir(v.diff.MetaPath()) == filepath.Dir(i.Source) && strings.Contains(v.id.Hex(), filepath.Base(i.Dir)) {
			return v
		}
	}
	return nil
}

// sweep removes mount points and markers that nothing uses.
func (m *Manager) sweep() error {
	used := make(map[string]bool)
	for _, s := range m.Stats() {
		if s.Dir != "" {
			used[filepath.Base(s.Dir)] = true
			used[s.ID.Hex()] = s.Lazy
		}
	}
	m.mu.RLock()
	for id, i := range m.left {
		used[filepath.Base(i.dir)], used[id.Hex()] = true, true
	}
	m.mu.RUnlock()
	for _, sub := range []string{mountsDir, lazyDir} {
		entries, err := os.ReadDir(filepath.Join(m.root, sub))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if used[e.Name()] {
				continue
			}
			if err := os.Remove(filepath.Join(m.root, sub, e.Name())); err != nil {
				m.cfg.Log.Warn("cannot remove an unused mount point or marker", "error", err)
			}
		}
	}
	return nil
}

func (m *Manager) markPath(id blockdev.Digest) string {
	return filepath.Join(m.root, lazyDir, id.Hex())
}

// mark notes that a diff may be mounted lazily. It need not survive a power
// loss, since mounts do not either.
func (m *Manager) mark(id blockdev.Digest) error {
	f, err := os.OpenFile(m.markPath(id), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

func (m *Manager) unmark(id blockdev.Digest) error {
	if err := os.Remove(m.markPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (m *Manager) marked(id blockdev.Digest) bool {
	_, err := os.Lstat(m.markPath(id))
	return err == nil
}
