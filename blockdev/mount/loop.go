package mount

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// errNoLoop: the kernel has no loop driver, or the device nodes are missing.
var errNoLoop = errors.New("no loop devices")

// loopTries bounds how often another process may take the free device before we
// do.
const loopTries = 64

// attachLoop puts a read-only loop device with blocks of 512 bytes over path. It
// is gone when the returned file is closed, unless it is mounted by then. It reads
// path with direct I/O if that is served by FUSE (see served).
func attachLoop(path string) (*os.File, error) {
	backing, err := openQuietly(path)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	direct, err := served(backing)
	if err != nil {
		return nil, err
	}
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoLoop, err)
	}
	defer ctl.Close()
	for range loopTries {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("%w: LOOP_CTL_GET_FREE: %w", errNoLoop, err)
		}
		dev, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), os.O_RDWR, 0)
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w (is /dev a devtmpfs?)", errNoLoop, err)
		}
		if err != nil {
			return nil, err
		}
		err = configureLoop(dev, backing, direct)
		if err == nil {
			return dev, nil
		}
		_ = dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("loop device over %s: %w", path, err)
		}
	}
	return nil, fmt.Errorf("loop device over %s: other programs took each of %d free ones: %w", path, loopTries, unix.EBUSY)
}

// openQuietly opens a file that this process may be serving itself. os.Open would
// ask the kernel from inside Go's scheduler, holding its only thread if
// GOMAXPROCS is 1, whether the file can be polled, and FUSE would pass the
// question on to us.
func openQuietly(path string) (*os.File, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// served says whether a process serves the file through FUSE. A loop device needs direct
// I/O for such a file: without it, the device reads for each control group one request
// after the other, and reads of present bytes would wait for those of missing ones. A
// file on disk needs the opposite: small files lie one after the other in it, the page
// cache reads ahead across them, and direct I/O does not.
func served(f *os.File) (bool, error) {
	var st unix.Statfs_t
	for {
		err := unix.Fstatfs(int(f.Fd()), &st)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("file system of %s: %w", f.Name(), err)
		}
		return st.Type == unix.FUSE_SUPER_MAGIC, nil
	}
}

func configureLoop(dev, backing *os.File, direct bool) error {
	cfg := unix.LoopConfig{
		Fd:   uint32(backing.Fd()),
		Size: 512,
		Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR},
	}
	if direct {
		cfg.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	}
	// Shown by losetup, which needs no more than this.
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], backing.Name())
	err := unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
	if direct && errors.Is(err, unix.EINVAL) {
		// A kernel that refuses direct I/O here where others leave it out.
		cfg.Info.Flags &^= unix.LO_FLAGS_DIRECT_IO
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
	}
	return err
}
