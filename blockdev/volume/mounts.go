package volume

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/mount"
)

// mounter makes, changes and takes away the mounts of volumes: each at a mount point of
// its own name, and with a marker for as long as it is, or may be, lazy. Its lock may be
// taken while the Manager's is held, never the other way round.
type mounter struct {
	root   string
	log    *slog.Logger
	loop   bool
	retire time.Duration // Config.RetireAfter
	// unsupported is why this kernel cannot show block images as they are; nil: it can.
	// It is set by probe, before anything is mounted.
	unsupported error

	mu    sync.Mutex
	names map[string]blockdev.Digest // of mount points
}

func newMounter(cfg Config, root string) *mounter {
	return &mounter{root: root, log: cfg.Log, loop: cfg.Loop, retire: cfg.RetireAfter, names: make(map[string]blockdev.Digest)}
}

// probe finds out whether this kernel shows block images as they are.
func (m *mounter) probe() {
	err := mount.Probe(filepath.Join(m.root, probeDir), mount.Options{Loop: m.loop})
	if errors.Is(err, blockdev.ErrUnsupported) {
		m.unsupported = err
		m.log.Error("this kernel cannot serve images lazily; containerd unpacks them", "error", err)
	} else if err != nil {
		m.log.Warn("cannot test whether this kernel can serve images lazily; shoal assumes that it can", "error", err)
	}
}

// mount mounts a volume that is not mounted, and returns where. The caller has the
// volume's turn.
func (m *mounter) mount(v *volume) (string, error) {
	if m.unsupported != nil {
		return "", fmt.Errorf("diff %s: %w", v.id, m.unsupported)
	}
	return m.show(v)
}

// show mounts the diff as it is now at a mount point where nothing of the volume is
// mounted, and returns that. What was mounted before is retired. The caller has the
// volume's turn.
func (m *mounter) show(v *volume) (string, error) {
	dir, err := m.place(v)
	if err != nil {
		return "", err
	}
	if err := mount.MkdirMountpoint(dir); err != nil {
		return "", err
	}
	lazy, meta, data := !v.diff.Complete(), v.diff.MetaPath(), v.diff.DataPath()
	if lazy {
		data = m.fusePath(v.id)
		if err := m.markLazy(v, dir); err != nil {
			return "", err
		}
	}
	if _, err := mount.Mount(meta, data, dir, mount.Options{Loop: m.loop}); err != nil {
		_ = os.Remove(dir) // if that fails, then the next start does it
		return "", fmt.Errorf("diff %s: %w", v.id, errors.Join(err, m.unmarkFailed(v)))
	}
	v.setMounted(dir, meta, lazy)
	if !lazy {
		m.unmarkNative(v)
	}
	return dir, nil
}

// unmount takes the volume's mounts away, also those in use if detach is set. The
// caller has the volume's turn.
func (m *mounter) unmount(v *volume, detach bool) error {
	dirs := v.mountPoints()
	for _, dir := range dirs {
		if err := m.takeAway(v, dir, detach); err != nil {
			return err
		}
		v.dropRetiree(dir)
	}
	v.setUnmounted()
	if len(dirs) == 0 {
		return nil
	}
	return m.unmark(v.id)
}

// takeAway unmounts dir, where the volume is mounted, and removes it.
func (m *mounter) takeAway(v *volume, dir string, detach bool) error {
	err := mount.Unmount(dir)
	if errors.Is(err, mount.ErrBusy) && detach {
		m.log.Warn("a mount that the node removes is still in use; it is detached, and programs that use it may get I/O errors", "diff", v.id, "dir", dir)
		err = mount.Detach(dir)
	}
	if err != nil {
		return fmt.Errorf("diff %s: %w", v.id, err)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		m.log.Warn("cannot remove a mount point", "dir", dir, "error", err)
	}
	return nil
}

// nameDigits is the length of a mount point's name.
const nameDigits = 12

// places are the mount points that a diff can have: each has other digits of its DiffID
// as its name.
func (m *mounter) places(id blockdev.Digest) (dirs []string) {
	for hex := id.Hex(); len(hex) >= nameDigits; hex = hex[nameDigits:] {
		dirs = append(dirs, filepath.Join(m.root, mountsDir, hex[:nameDigits]))
	}
	return dirs
}

// place gives a volume a mount point: the one that the last process had it mounted at, or
// else the first that no other diff has, and where nothing of this one is mounted. If there
// is none, then what was replaced first makes room. The caller has the volume's turn.
func (m *mounter) place(v *volume) (string, error) {
	used := v.mountPoints()
	free := m.free(v.id, v.homeDir(), used)
	if free == "" && len(used) > 1 {
		free = used[0]
		if err := m.takeAway(v, free, true); err != nil {
			return "", err
		}
		v.dropRetiree(free)
	}
	if free == "" {
		return "", fmt.Errorf("diff %s: other diffs use each name that its mount point could have", v.id)
	}
	return free, nil
}

// free takes a mount point for a diff that is not used, home before all others, unless it is
// empty; "": there is none.
func (m *mounter) free(id blockdev.Digest, home string, used []string) string {
	places := m.places(id)
	if home != "" {
		places = append([]string{home}, places...)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, dir := range places {
		name := filepath.Base(dir)
		if owner, taken := m.names[name]; (!taken || owner == id) && !slices.Contains(used, dir) {
			m.names[name] = id
			return dir
		}
	}
	return ""
}

// setName notes that the mount point dir is a diff's.
func (m *mounter) setName(dir string, id blockdev.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.names[filepath.Base(dir)] = id
}

// forget frees the names of a diff.
func (m *mounter) forget(id blockdev.Digest) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, owner := range m.names {
		if owner == id {
			delete(m.names, name)
		}
	}
}

// usable reports whether a mount that an earlier process left can stay.
func (m *mounter) usable(v *volume, i mount.Info, lazy, adopted bool) bool {
	if !lazy {
		// If it was complete and is not, that mount is as good as any to those that have
		// it, and gets its bytes back beneath.
		return v.diff.Completed()
	}
	if complete := v.diff.Complete(); i.Kind != mount.Loop || complete == adopted {
		return adopted
	}
	// What loop devices are over is put right: they can do without a connection that is lost,
	// if all is here; and the process may have ended when it had marked the mount, and had not
	// switched them.
	from, to := m.fusePath(v.id), v.diff.DataPath()
	if adopted {
		from, to = to, from
	}
	err := switchLoop(from, to)
	if err != nil {
		m.log.Warn("cannot put the other file beneath a mount by loop devices; the mount is made again", "diff", v.id, "file", to, "error", err)
	}
	return err == nil
}

func (m *mounter) fusePath(id blockdev.Digest) string {
	return filepath.Join(m.root, fuseDir, id.Hex())
}

func (m *mounter) markPath(id blockdev.Digest) string {
	return filepath.Join(m.root, lazyDir, id.Hex())
}

// markLazy notes that what is going to be mounted at dir is lazy. What the volume has
// mounted now stays marked, if it is lazy.
func (m *mounter) markLazy(v *volume, dir string) error {
	dirs := []string{dir}
	if now, lazy, _ := v.mounted(); lazy && now != dir {
		dirs = append(dirs, now)
	}
	return m.mark(v.id, dirs...)
}

// unmarkFailed undoes markLazy, if nothing lazy was mounted after it.
func (m *mounter) unmarkFailed(v *volume) error {
	if _, lazy, _ := v.mounted(); lazy {
		return nil // one mount point more is marked, and nothing is mounted there
	}
	return m.unmark(v.id)
}

// mark writes a diff's marker, which names the mount points of lazy mounts, one a line. It
// need not survive a power loss, since mounts do not either. Versions before wrote nothing
// in it: then all mounts of the diff may be lazy.
func (m *mounter) mark(id blockdev.Digest, dirs ...string) error {
	var b strings.Builder
	for _, dir := range dirs {
		b.WriteString(filepath.Base(dir) + "\n")
	}
	// Never seen half written: the process may be killed at any time.
	tmp := m.markPath(id) + ".new"
	if err := os.WriteFile(tmp, []byte(b.String()), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, m.markPath(id))
}

func (m *mounter) unmark(id blockdev.Digest) error {
	if err := os.Remove(m.markPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// unmarkNative is unmark once the volume is mounted natively. A marker that stays has the
// next process mount it again.
func (m *mounter) unmarkNative(v *volume) {
	if err := m.unmark(v.id); err != nil {
		m.log.Warn("cannot remove the marker of a lazy mount; the next start changes the mount again", "diff", v.id, "error", err)
	}
}

// marked says whether an earlier process had, or may have had, lazy mounts of a diff.
func (m *mounter) marked(id blockdev.Digest) bool {
	_, err := os.Lstat(m.markPath(id))
	return err == nil
}

// markedAt says whether what is mounted at dir is, or may be, lazy. Of what had been replaced
// it does not know.
func (m *mounter) markedAt(id blockdev.Digest, dir string) bool {
	b, err := os.ReadFile(m.markPath(id))
	if err != nil {
		return !errors.Is(err, os.ErrNotExist)
	}
	names := strings.Fields(string(b))
	return len(names) == 0 || slices.Contains(names, filepath.Base(dir))
}
