package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// BootID names this boot of the kernel.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot ID: %w", err)
	}
	return string(b), nil
}

// ErrLocked: another process has the lock.
var ErrLocked = errors.New("another process has this cache open")

// Lock locks a file, which it makes if it is not there. It fails with ErrLocked if
// another process has it. The kernel lets go of the lock when the process ends.
func Lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := Control(f, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Write makes a file that is not there yet; sync: its bytes are on stable storage
// when it returns.
func Write(path string, b []byte, sync bool) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && sync {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Full: err is that of a full disk, or of a full quota of its file system.
func Full(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// Is compares a file with what it should hold, a little at a time. One that is
// missing holds something else.
func Is(path string, want []byte) (bool, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() != int64(len(want)) {
		return false, err
	}
	buf := make([]byte, 64<<10)
	for len(want) > 0 {
		n, err := io.ReadFull(f, buf[:min(len(buf), len(want))])
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			return false, err
		}
		if err != nil || !bytes.Equal(buf[:n], want[:n]) {
			return false, nil
		}
		want = want[n:]
	}
	return true, nil
}

// dropBack is how far before a range pages are dropped with it. The page cache
// keeps what a range covers in part, and its units are up to a megabyte and more
// on file systems with large folios; so one that the last range left over goes
// with the next.
const dropBack = 2 << 20

// Drop drops clean pages of a file from the page cache. It is a hint, so an
// error means nothing.
func Drop(f *os.File, off, n int64) {
	back := min(off, dropBack)
	off, n = off-back, n+back
	_ = Control(f, func(fd int) error { return unix.Fadvise(fd, off, n, unix.FADV_DONTNEED) })
}

// Sync takes a file's bytes to stable storage.
func Sync(f *os.File) error {
	if err := Control(f, unix.Fdatasync); err != nil {
		return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
	}
	return nil
}

// Control calls fn with the descriptor of f, which stays open during the call.
func Control(f *os.File, fn func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var res error
	if err := rc.Control(func(fd uintptr) {
		for {
			if res = fn(int(fd)); !errors.Is(res, unix.EINTR) {
				return
			}
		}
	}); err != nil {
		return err
	}
	return res
}
