package volume

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/blockdev/mount"
)

// mounter makes, changes and takes away the mounts of volumes: each at a mount point of
// its own name, and with a marker for as long as it is, or may be, lazy. Its lock may be
// taken while the Manager's is held, never the other way round.
type mounter struct {
	root string
	log  *slog.Logger
	loop bool
	// unsupported is why this kernel cannot show block images as they are; nil: it can.
	// It is set by probe, before anything is mounted.
	unsupported error

	mu    sync.Mutex
	names map[string]blockdev.Digest // of mount points
}

func newMounter(cfg Config, root string) *mounter {
	return &mounter{root: root, log: cfg.Log, loop: cfg.Loop, names: make(map[string]blockdev.Digest)}
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
	name, err := m.name(v.id)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(m.root, mountsDir, name)
	if err := mount.MkdirMountpoint(dir); err != nil {
		return "", err
	}
	lazy, data := false, v.diff.DataPath()
	if !v.diff.Complete() {
		lazy, data = true, m.fusePath(v.id)
		if err := m.mark(v.id); err != nil {
			return "", err
		}
	} else if err := m.unmark(v.id); err != nil {
		return "", err
	}
	meta := v.diff.MetaPath()
	if _, err := mount.Mount(meta, data, dir, mount.Options{Loop: m.loop}); err != nil {
		return "", fmt.Errorf("diff %s: %w", v.id, errors.Join(err, m.unmark(v.id)))
	}
	v.setMounted(dir, meta, lazy)
	return dir, nil
}

// unmount takes the volume's mount away, also one in use if detach is set. The
// caller has the volume's turn.
func (m *mounter) unmount(v *volume, detach bool) error {
	dir, _, _ := v.mounted()
	if dir == "" {
		return nil
	}
	err := mount.Unmount(dir)
	if errors.Is(err, mount.ErrBusy) && detach {
		m.log.Warn("a removed diff is still in use; its mount is detached, and programs that use it may get I/O errors", "diff", v.id, "dir", dir)
		err = mount.Detach(dir)
	}
	if err != nil {
		return fmt.Errorf("diff %s: %w", v.id, err)
	}
	v.setMounted("", "", false)
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		m.log.Warn("cannot remove a mount point", "dir", dir, "error", err)
	}
	return m.unmark(v.id)
}

// nameDigits is the length of a mount point's name.
const nameDigits = 12

// name gives a diff a mount point's name: the first digits of its DiffID that
// are not another diff's name.
func (m *mounter) name(id blockdev.Digest) (string, error) {
	hex := id.Hex()
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := 0; i+nameDigits <= len(hex); i += nameDigits {
		name := hex[i : i+nameDigits]
		if owner, taken := m.names[name]; !taken || owner == id {
			m.names[name] = id
			return name, nil
		}
	}
	return "", fmt.Errorf("diff %s: other diffs use each name that its mount point could have", id)
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
	if adopted {
		return true
	}
	// Loop devices can do without the connection that is lost, if all is here.
	return i.Kind == mount.Loop && v.diff.Complete() && switchLoop(m.fusePath(v.id), v.diff.DataPath()) == nil
}

func (m *mounter) fusePath(id blockdev.Digest) string {
	return filepath.Join(m.root, fuseDir, id.Hex())
}

func (m *mounter) markPath(id blockdev.Digest) string {
	return filepath.Join(m.root, lazyDir, id.Hex())
}

// mark notes that a diff may be mounted lazily. It need not survive a power
// loss, since mounts do not either.
func (m *mounter) mark(id blockdev.Digest) error {
	f, err := os.OpenFile(m.markPath(id), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

func (m *mounter) unmark(id blockdev.Digest) error {
	if err := os.Remove(m.markPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (m *mounter) marked(id blockdev.Digest) bool {
	_, err := os.Lstat(m.markPath(id))
	return err == nil
}
