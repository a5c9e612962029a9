package volume

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

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
	retired   []string // mount points of what it had replaced, the oldest first
}

// takeOver goes through these mounts, from the newest to the oldest. Those through FUSE stay
// if its connection is adopted. It returns the volumes that were mounted and are to be
// mounted again.
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
		lazy := m.mounts.markedAt(v.id, i.Dir)
		// If the newest is lost, then an older one is not better: it was replaced.
		if dir == "" && !slices.Contains(again, v) && m.mounts.usable(v, i, lazy, adopted) {
			m.mounts.setName(i.Dir, v.id)
			v.setMounted(i.Dir, i.Source, lazy)
			continue
		}
		if dir != "" && dir != i.Dir && adopted {
			m.mounts.setName(i.Dir, v.id)
			v.retireBefore(i.Dir)
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
			m.mounts.setName(i.Dir, v.id)
			v.setHome(i.Dir)
			again = append(again, v)
		}
	}
	if lost > 0 {
		m.cfg.Log.Error("cannot take over lazy mounts of the last process; they are made again, and containers that run on them get I/O errors until you restart the containers",
			"mounts", lost)
	}
	return again, nil
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
		lazy, lost := m.mounts.markedAt(id, i.Dir), !adopted && m.mounts.marked(id)
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.vols[id] != nil || lost {
			return false
		}
		left, ok := m.left[id]
		if ok {
			left.retired = append([]string{i.Dir}, left.retired...)
		} else {
			left = leftMount{dir: i.Dir, meta: i.Source, lazy: lazy}
		}
		m.mounts.setName(i.Dir, id)
		m.left[id] = left
		return true
	}
	return false
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
	for _, v := range m.volumes() {
		_, lazy, _ := v.mounted()
		used[v.id.Hex()] = lazy
		for _, dir := range v.mountPoints() {
			used[filepath.Base(dir)] = true
		}
	}
	m.mu.RLock()
	for id, i := range m.left {
		used[id.Hex()] = true
		for _, dir := range append(i.retired, i.dir) {
			used[filepath.Base(dir)] = true
		}
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
