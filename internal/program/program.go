// Package program opens programs so that they can be started again whatever
// becomes of the file, and moves the running one off file systems that need it.
//
// A program is read from its file as it runs, page by page, whenever the kernel
// has dropped a page. A daemon that serves the very file system that its own
// program lies on would wait for itself, and so would a program that starts this
// daemon again. So a program on a file system that shoal may serve, or that lies
// over one, is run from a copy in memory.
package program

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// copiedEnv says which file the running program was copied from, as identity
// gives it.
const copiedEnv = "SHOAL_PROGRAM_COPIED_FROM"

// Open opens a program to be started by Path, now or at any later time. It is
// the file itself, or a copy in memory where shoal may serve the file.
// A script is refused: what runs then is an interpreter, which is not held.
func Open(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	var magic [4]byte
	if _, err := f.ReadAt(magic[:], 0); err != nil && !errors.Is(err, io.EOF) || string(magic[:]) != "\x7fELF" {
		f.Close()
		return nil, fmt.Errorf("%s is not a program that Linux runs by itself (a script is not): name the program", path)
	}
	borrowed, err := dependent(f)
	if err != nil || !borrowed {
		return f, err
	}
	defer f.Close()
	if id, err := identity(f); err == nil && id == os.Getenv(copiedEnv) {
		return os.Open("/proc/self/exe") // the copy that runs this
	}
	return inMemory(f)
}

// Path is where another process can execute f, while this one has it open.
func Path(f *os.File) string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
}

// Detach starts the running program again from a copy in memory, if its file is
// on a file system that shoal may serve. It returns if not, or if that fails. It
// is to be called before the program does anything else.
func Detach() error {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer f.Close()
	if borrowed, err := dependent(f); err != nil || !borrowed {
		return err
	}
	id, err := identity(f)
	if err != nil {
		return err
	}
	m, err := inMemory(f)
	if err != nil {
		return err
	}
	defer m.Close()
	env := append(os.Environ(), copiedEnv+"="+id)
	return fmt.Errorf("start %s from memory: %w", f.Name(), unix.Exec(Path(m), os.Args, env))
}

// SetName gives this process its name in ps, top and the kernel's log. One that
// was started by Path is called by the number of a descriptor.
func SetName(name string) {
	_ = os.WriteFile("/proc/self/comm", []byte(name), 0) // for people to look at
}

// dependent says whether a file is on a file system that shoal may serve.
func dependent(f *os.File) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return false, &os.PathError{Op: "statfs", Path: f.Name(), Err: err}
	}
	switch uint32(st.Type) {
	case unix.EROFS_SUPER_MAGIC_V1, unix.OVERLAYFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC:
		return true, nil
	}
	return false, nil
}

func identity(f *os.File) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return fmt.Sprintf("%d:%d:%d", st.Dev, st.Ino, st.Mtim.Nano()), nil
}

// inMemory copies a file.
func inMemory(f *os.File) (_ *os.File, err error) {
	name := f.Name()[strings.LastIndexByte(f.Name(), '/')+1:]
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3 all can be executed
		fd, err = unix.MemfdCreate(name, flags)
	}
	if err != nil {
		return nil, fmt.Errorf("copy %s to memory: %w", f.Name(), err)
	}
	m := os.NewFile(uintptr(fd), f.Name())
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	if _, err := io.Copy(m, io.NewSectionReader(f, 0, 1<<40)); err != nil {
		return nil, fmt.Errorf("copy %s to memory: %w", f.Name(), err)
	}
	if _, err := unix.FcntlInt(m.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		return nil, fmt.Errorf("copy %s to memory: %w", f.Name(), err)
	}
	// A program that is open for writing cannot be executed.
	r, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, err
	}
	return r, m.Close()
}
