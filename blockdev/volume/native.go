package volume

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/mount"
)

// matchInterval is how often all mounts are looked at, whether they are what they
// should be. Those that somebody asks for, or that have just become complete, do not
// wait for it.
const matchInterval = time.Minute

// matches reports whether a volume that is mounted is so in the way it should be:
// lazily as long as bytes are missing, or damaged, and else natively; and with the
// tree that the diff shows now.
func (v *volume) matches() bool {
	dir, lazy, gone := v.mounted()
	return dir == "" || gone || lazy != v.diff.Complete() && !v.outdated()
}

// match mounts a volume again, at the same place, if it is not mounted as it should
// be. What is mounted over the old mount, and files that are open in it, go on with
// it.
func (m *mounter) match(ctx context.Context, v *volume) {
	if v.matches() {
		return
	}
	if err := v.take(ctx); err != nil {
		return
	}
	defer v.give()
	m.matchNow(v)
}

// matchNow is match for the caller that has the volume's turn. An error leaves the mount as it
// was, which can be read, too.
func (m *mounter) matchNow(v *volume) {
	if v.matches() {
		return
	}
	dir, wasLazy, _ := v.mounted()
	lazy, outdated, meta := !v.diff.Complete(), v.outdated(), v.diff.MetaPath()
	data := map[bool]string{true: m.fusePath(v.id), false: v.diff.DataPath()}
	var err error
	if lazy {
		err = m.mark(v.id)
	}
	if err == nil {
		var loop bool
		switch loop, err = mountedByLoop(dir); {
		case err != nil:
		case loop && !outdated:
			// Beneath all that use it.
			err = switchLoop(data[wasLazy], data[lazy])
		default:
			err = mount.Replace(meta, data[lazy], dir, mount.Options{Loop: loop})
		}
	}
	if err != nil {
		m.log.Warn("cannot change the mount of a layer; the layer stays mounted as it is, and the node tries again", "diff", v.id, "lazy", wasLazy, "error", err)
		return
	}
	v.setMounted(dir, meta, lazy)
	if lazy {
		return
	}
	// A marker that stays has the next process do this again.
	if err := m.unmark(v.id); err != nil {
		m.log.Warn("cannot remove the marker of a lazy mount; the next start changes the mount again", "error", err)
	}
}

func mountedByLoop(dir string) (bool, error) {
	found, err := mount.List(dir)
	return slices.ContainsFunc(found, func(i mount.Info) bool { return i.Dir == dir && i.Kind == mount.Loop }), err
}

func switchLoop(from, to string) error {
	n, err := mount.Switch(from, to)
	if err == nil && n == 0 {
		err = errors.New("no loop device is over " + from)
	}
	return err
}

// matcher looks after all mounts: at once, for those that were adopted, and then for
// those that could not be mounted again.
func (m *mounter) matcher(ctx context.Context, volumes func() []*volume) {
	t := time.NewTicker(matchInterval)
	defer t.Stop()
	for {
		for _, v := range volumes() {
			m.match(ctx, v)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// LazyUsers returns, for the diffs that are read through FUSE, how many mounts
// do: overlayfs mounts of containers, mostly. Each is one that began before the diff
// was complete and mounted natively, and depends on this process until it ends.
// What other mount namespaces have mounted is not seen.
func (m *Manager) LazyUsers() (map[blockdev.Digest]int, error) {
	users, err := mount.Users(filepath.Join(m.root, mountsDir))
	if err != nil || len(users) == 0 {
		return nil, err
	}
	count := make(map[blockdev.Digest]int)
	for _, v := range m.volumes() {
		dir, lazy, gone := v.mounted()
		if dir == "" || gone {
			continue
		}
		if n := len(v.users(users, dir, lazy)); n > 0 {
			count[v.id] = n
		}
	}
	return count, nil
}

// users picks those mounts that use the volume: all of them, or those from before
// what is mounted at dir now.
func (v *volume) users(all []mount.User, dir string, current bool) (mine []mount.User) {
	var serial uint64
	for _, u := range all {
		if !u.Uses(v.diff.MetaPath(), dir) {
			continue
		}
		if !current && serial == 0 {
			serial = mount.Serial(dir)
		}
		if current || mount.Serial(u.Dir) < serial {
			mine = append(mine, u)
		}
	}
	return mine
}
