package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Numbers that package unix does not have.
const (
	moveMountBeneath = 0x200  // MOVE_MOUNT_BENEATH, Linux 6.5
	loopChangeFD     = 0x4c06 // LOOP_CHANGE_FD
)

// Replace mounts an image in the place of the one that is mounted at dir. A program that
// looks there during the call finds one or the other, and never the directory below; before
// Linux 6.5 it may find that for a moment. A user of the old mount (an overlayfs mount
// over it, an open file) goes on using it; the mount is gone after its last user.
func Replace(meta, data, dir string, o Options) error {
	err := replace(meta, data, dir, o)
	if o.Loop && errors.Is(err, unix.EINVAL) {
		if err = Detach(dir); err == nil {
			_, err = Mount(meta, data, dir, o)
		}
	}
	return err
}

func replace(meta, data, dir string, o Options) error {
	if o.Loop {
		for _, path := range []*string{&meta, &data} {
			dev, err := attachLoop(*path)
			if err != nil {
				return explain(err, meta, dir)
			}
			defer dev.Close() // cleared then, if it is not mounted
			*path = dev.Name()
		}
	}
	m, err := newErofs(meta, data)
	if err != nil {
		return fmt.Errorf("mount %s: %w", meta, err)
	}
	// Attached by then, or not: then closing it ends it.
	defer func() { _ = unix.Close(m) }()
	if err := unix.MoveMount(m, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH|moveMountBeneath); err != nil {
		return fmt.Errorf("mount %s beneath %s: %w", meta, dir, err)
	}
	return Detach(dir)
}

// newErofs makes a mount that is nowhere yet.
func newErofs(source, device string) (int, error) {
	fs, err := unix.Fsopen(fsErofs, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(fs) }()
	err = errors.Join(
		unix.FsconfigSetString(fs, "source", source),
		unix.FsconfigSetString(fs, "device", device),
		unix.FsconfigSetFlag(fs, "ro"))
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		return -1, err
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
}

// Switch has every loop device over the file from read the file to from now on: of
// the same length, with the same bytes. Mounts over the devices stay as they are,
// also those that are seen nowhere any more. It returns how many devices are over to
// then.
func Switch(from, to string) (int, error) {
	found, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return 0, err
	}
	n := 0
	for _, f := range found {
		dev := strings.TrimPrefix(filepath.Dir(filepath.Dir(f)), "/sys/block/loop")
		switch loopBacking(dev) {
		case to:
			n++
			continue
		case from:
		default:
			continue
		}
		if err := switchLoop("/dev/loop"+dev, to); err != nil {
			return n, fmt.Errorf("loop device %s from %s to %s: %w", dev, from, to, err)
		}
		n++
	}
	return n, nil
}

func switchLoop(dev, to string) error {
	backing, err := openQuietly(to)
	if err != nil {
		return err
	}
	defer backing.Close()
	direct, err := served(backing)
	if err != nil {
		return err
	}
	d, err := os.Open(dev)
	if err != nil {
		return err
	}
	defer d.Close()
	// Each change waits for all reads that the device is doing, and holds up new ones. So
	// direct I/O is set while the device reads from the disk, which answers soon.
	if direct {
		err = setDirect(d, true)
	}
	if err == nil {
		err = unix.IoctlSetInt(int(d.Fd()), loopChangeFD, int(backing.Fd()))
	}
	if err == nil && !direct {
		err = setDirect(d, false)
	}
	return err
}

// setDirect turns a loop device's direct I/O on or off. If the kernel has no direct I/O
// for the file, then the device stays without.
func setDirect(d *os.File, direct bool) error {
	v := 0
	if direct {
		v = 1
	}
	if err := unix.IoctlSetInt(int(d.Fd()), unix.LOOP_SET_DIRECT_IO, v); !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}
