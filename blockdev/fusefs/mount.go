package fusefs

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// FSType is what mountinfo shows for the mount.
	FSType = "fuse.shoal"
	// MaxRead is the largest READ that the kernel sends, in bytes.
	MaxRead = 1 << 20
)

// Mount opens /dev/fuse and mounts it at dir, an existing directory. The
// connection lives until the last copy of the returned descriptor is closed, or
// the mount is gone and its files are not in use any more. Nothing is answered
// before a server serves the descriptor (New, Serve), so a process that touches dir
// before that waits.
//
// Only root sees the files: the mount has no allow_other. EROFS reads them with
// the rights of the process that mounted it, not of the container's process.
func Mount(dir string) (*os.File, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
			return nil, fmt.Errorf("open /dev/fuse: %w (the kernel needs FUSE: modprobe fuse)", err)
		}
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,max_read=%d", fd, MaxRead)
	flags := uintptr(unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME)
	if err := unix.Mount("shoal", dir, FSType, flags, opts); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("mount FUSE at %s: %w", dir, err)
	}
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

// Alive says whether the connection of a descriptor is still there: not aborted,
// and mounted somewhere or in use.
func Alive(fd *os.File) bool {
	conn, err := fd.SyscallConn()
	if err != nil {
		return false
	}
	alive := false
	err = conn.Control(func(fd uintptr) {
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			_, err = unix.Poll(p[:], 0)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		alive = err == nil && p[0].Revents&(unix.POLLERR|unix.POLLNVAL) == 0
	})
	return alive && err == nil
}
