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

// defaultRetire is Config.RetireAfter's default.
const defaultRetire = 2 * time.Minute

// matches reports whether a volume that is mounted is so in the way it should be:
// lazily as long as bytes are missing, or damaged, and else natively; and with the
// tree that the diff shows now.
func (v *volume) matches() bool {
	dir, lazy, gone := v.mounted()
	return dir == "" || gone || lazy != v.diff.Complete() && !v.outdated()
}

// match mounts a volume again if it is not mounted as it should be. What is mounted over
// the old mount, and files that are open in it, go on with it.
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
//
// The new mount has a mount point of its own, and the old one stays for a while.
// overlayfs looks the lower directories up, and takes a copy of their mounts after that;
// if one of them is unmounted in between, then mount(2) fails with EINVAL, and so the
// container that containerd was just starting.
func (m *mounter) matchNow(v *volume) {
	if v.matches() {
		return
	}
	dir, wasLazy, _ := v.mounted()
	loop, err := mountedByLoop(dir)
	switch {
	case err != nil:
	case loop && !v.outdated():
		err = m.switchLoops(v)
	default:
		_, err = m.show(v)
	}
	if err != nil {
		m.log.Warn("cannot change the mount of a layer; the layer stays mounted as it is, and the node tries again", "diff", v.id, "lazy", wasLazy, "error", err)
	}
}

// switchLoops puts the other file beneath a mount by loop devices, and so beneath all
// that use it.
func (m *mounter) switchLoops(v *volume) error {
	dir, wasLazy, _ := v.mounted()
	lazy, meta := !v.diff.Complete(), v.diff.MetaPath()
	if lazy {
		if err := m.markLazy(v, dir); err != nil {
			return err
		}
	}
	data := map[bool]string{true: m.fusePath(v.id), false: v.diff.DataPath()}
	if err := switchLoop(data[wasLazy], data[lazy]); err != nil {
		if lazy {
			if _, uerr := mount.Switch(data[lazy], data[wasLazy]); uerr != nil { // so the marker stays
				return errors.Join(err, uerr)
			}
			return errors.Join(err, m.unmarkFailed(v))
		}
		return err
	}
	v.setMounted(dir, meta, lazy)
	if !lazy {
		m.unmarkNative(v)
	}
	return nil
}

// tidy unmounts what the volume had mounted until a while ago. What uses such a mount
// has a copy of its own; one that is busy all the same waits for the next time.
func (m *mounter) tidy(ctx context.Context, v *volume, now time.Time) {
	if len(v.retirees(now.Add(-m.retire))) == 0 || v.take(ctx) != nil {
		return
	}
	defer v.give()
	for _, dir := range v.retirees(now.Add(-m.retire)) {
		switch err := m.takeAway(v, dir, false); {
		case err == nil:
			v.dropRetiree(dir)
		case !errors.Is(err, mount.ErrBusy):
			m.log.Warn("cannot unmount what a layer had mounted before; the node tries again", "diff", v.id, "dir", dir, "error", err)
		}
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
	t := time.NewTicker(min(matchInterval, m.retire))
	defer t.Stop()
	for {
		for _, v := range volumes() {
			m.match(ctx, v)
			m.tidy(ctx, v, time.Now())
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
		if n := len(m.mounts.users(v, users, dir, lazy)); n > 0 {
			count[v.id] = n
		}
	}
	return count, nil
}

// users picks those mounts that use the volume: all of them, or those from before
// what is mounted at dir now.
func (m *mounter) users(v *volume, all []mount.User, dir string, current bool) (mine []mount.User) {
	places := m.places(v.id)
	var serial uint64
	for _, u := range all {
		if !u.Uses(v.diff.MetaPath(), places...) {
			continue
		}
		if !current && serial == 0 {
			serial = mount.Serial(dir)
		}
		if current || mount.Serial(u.Dir) < serial || !u.Uses(v.diff.MetaPath(), dir) {
			mine = append(mine, u)
		}
	}
	return mine
}
