package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const loopChangeFD = 0x4c06 // LOOP_CHANGE_FD, which package unix does not have

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
