package fusefs

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxBackground is how many asynchronous requests of a connection the kernel gives out
// before it has them wait, behind one another and unseen by the server: as many as the
// protocol can say. All reads by EROFS and by loop devices are asynchronous, of all
// diffs, and those of them whose bytes are missing may stay for long. One diff may have
// half as many waiting here at the most (maxLine): else it would keep the reads of all
// others from ever coming here.
const maxBackground = 1<<16 - 1

// limitFiles are a connection's limits in fusectl.
var limitFiles = [...]string{"max_background", "congestion_threshold"}

// Widen gives a connection that an earlier process has opened the limits that this
// version gives to new ones. init is what Server.Init returned on it, minor the minor
// device number of its mount. The limits are part of FUSE_INIT, which the kernel sends
// once, so they outlive the process that has chosen them; only the control file system
// changes them, which is mounted for that where no process sees it. No process need serve the
// connection meanwhile. An init that is damaged is blockdev.ErrCorrupt.
func Widen(init []byte, minor uint32) error {
	a, err := parseAgreement(init)
	if err != nil {
		return err
	}
	if a.background() >= maxBackground {
		return nil
	}
	ctl, err := mountControl()
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(ctl) }() // unmounts it
	for _, name := range limitFiles {
		if err := raise(ctl, fmt.Sprintf("%d/%s", minor, name)); err != nil {
			return err
		}
	}
	return nil
}

// mountControl returns a mount of fusectl that is attached nowhere.
func mountControl() (int, error) {
	fs, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open fusectl: %w", err)
	}
	defer func() { _ = unix.Close(fs) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("make fusectl: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mount fusectl: %w", err)
	}
	return fd, nil
}

// raise sets one limit to maxBackground unless it is as high already.
func raise(ctl int, name string) error {
	now, err := readControl(ctl, name)
	if err != nil || now >= maxBackground {
		return err
	}
	return writeControl(ctl, name, maxBackground)
}

// readControl reads a number off a file of fusectl.
func readControl(ctl int, name string) (int, error) {
	fd, err := unix.Openat(ctl, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: "fusectl/" + name, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	var b [32]byte
	n, err := unix.Read(fd, b[:])
	if err != nil {
		return 0, &os.PathError{Op: "read", Path: "fusectl/" + name, Err: err}
	}
	v, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil {
		return 0, fmt.Errorf("fusectl/%s: %w", name, err)
	}
	return v, nil
}

// writeControl needs a descriptor of its own: fusectl takes a number at the beginning of
// a file that cannot seek.
func writeControl(ctl int, name string, v int) error {
	fd, err := unix.Openat(ctl, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "fusectl/" + name, Err: err}
	}
	_, err = unix.Write(fd, strconv.AppendInt(nil, int64(v), 10))
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return &os.PathError{Op: "write", Path: "fusectl/" + name, Err: err}
	}
	return nil
}
