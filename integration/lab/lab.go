package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
)

// Lab is one set-up: a directory and what was started in it.
type Lab struct {
	// Dir holds everything; logs are in Dir/log.
	Dir string
	// Bin holds the programs that were built: shoal, containerd, ctr and the shim.
	Bin string

	host *Host // where processes start; nil: this machine
	undo *undo
}

// undo is what Close does; all views of a lab (At) share it.
type undo struct {
	mu    sync.Mutex
	steps []func() error
}

// New makes an empty lab in a new directory below os.TempDir. bin is the
// directory with the built programs. Close removes the directory.
func New(bin string) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the lab mounts file systems and runs containers: run it as root")
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	// Short, because socket paths are limited to 108 bytes.
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		return nil, err
	}
	// As /run and /var/lib are: who is root in a user namespace goes through here.
	if err := os.Chmod(dir, 0o711); err != nil { //nolint:gosec // to go through, not to list
		return nil, err
	}
	l := &Lab{Dir: dir, Bin: bin, undo: &undo{}}
	if err := os.Mkdir(l.Path("log"), 0o700); err != nil {
		return nil, err
	}
	if err := os.WriteFile(l.TokenFile(), []byte("the lab's own token\n"), 0o600); err != nil {
		return nil, err
	}
	l.OnClose(func() error { return l.RemoveAll(l.Dir) })
	return l, nil
}

// Path joins elements below the lab's directory.
func (l *Lab) Path(elem ...string) string {
	return filepath.Join(append([]string{l.Dir}, elem...)...)
}

// OnClose adds a step for Close; steps run in reverse order.
func (l *Lab) OnClose(f func() error) {
	l.undo.mu.Lock()
	defer l.undo.mu.Unlock()
	l.undo.steps = append(l.undo.steps, f)
}

// pop takes the last step; nil when there is none.
func (u *undo) pop() func() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	last := len(u.steps) - 1
	if last < 0 {
		return nil
	}
	f := u.steps[last]
	u.steps = u.steps[:last]
	return f
}

// Close undoes everything and returns what could not be undone. It may be
// called more than once.
func (l *Lab) Close() error {
	var errs []error
	for f := l.undo.pop(); f != nil; f = l.undo.pop() {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// Mounts lists the mount points below the lab's directory, deepest first.
func (l *Lab) Mounts() ([]string, error) { return mountsBelow(l.Dir) }

func mountsBelow(dir string) ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, err
	}
	dirs := make([]string, 0, len(infos))
	for _, i := range infos {
		dirs = append(dirs, i.Mountpoint)
	}
	sort.Slice(dirs, func(a, b int) bool { return len(dirs[a]) > len(dirs[b]) })
	return dirs, nil
}

// RemoveAll removes a directory of the lab, and first whatever is mounted below it.
func (l *Lab) RemoveAll(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mounts {
		if err := syscall.Unmount(m, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err // removing would reach into what is still mounted
	}
	return os.RemoveAll(dir)
}

// FreeAddr returns a loopback address that nothing listens on.
func FreeAddr() (string, error) { return freeAddr("127.0.0.1") }

func freeAddr(ip string) (string, error) {
	ln, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
	if err != nil {
		return "", err
	}
	addr := ln.Addr().String()
	return addr, ln.Close()
}

// freeAddr returns an address of the lab's host that nothing listens on.
func (l *Lab) freeAddr() (addr string, err error) {
	if l.host == nil {
		return FreeAddr()
	}
	err = l.host.do(func() error {
		addr, err = freeAddr(l.host.IP)
		return err
	})
	return addr, err
}

// WaitFor calls ok until it returns nil, 20 times a second, and gives up with
// its last error when timeout has passed.
func WaitFor(ctx context.Context, what string, timeout time.Duration, ok func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not within %v: %w", what, timeout, err)
		case <-tick.C:
		}
	}
}

// writeFile writes a file below the lab's directory and returns its path.
func (l *Lab) writeFile(name, content string) (string, error) {
	p := l.Path(name)
	if err := os.MkdirAll(filepath.Dir(p), 0o711); err != nil {
		return "", err
	}
	return p, os.WriteFile(p, []byte(content), 0o600)
}

// program finds a program in Bin, else in PATH and the sbin directories. An
// absolute path is taken as it is.
func (l *Lab) program(name string) (string, error) {
	if filepath.IsAbs(name) {
		return name, nil
	}
	dirs := append([]string{l.Bin}, filepath.SplitList(os.Getenv("PATH"))...)
	for _, d := range append(dirs, "/usr/sbin", "/usr/local/sbin", "/sbin") {
		p := filepath.Join(d, name)
		if st, err := os.Stat(p); err == nil && !st.IsDir() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("program %s not found in %s: run `make setup`", name, strings.Join(dirs, ":"))
}
