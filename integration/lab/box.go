package lab

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Box is a machine of its own: beside a network it has its own mounts, processes and
// disk, so that programs in it can have their default paths, ports and sockets. /usr
// and the lab's directory are this machine's; /etc, /opt, /usr/local and /var are
// copies that only the box writes to; /run is empty at first. When its first process
// ends, everything in it ends with it.
//
// What is started at it (Box.Lab) runs in it, and its pid is this machine's.
type Box struct {
	*Host
	// Lab starts what runs in the box.
	Lab *Lab

	dir    string // its disk is mounted here, as the box sees it
	image  string
	init   *exec.Cmd
	ended  chan struct{}
	handle io.Closer // the box lives as long as it is open
}

// boxInit is the first process of a box.
//
//go:embed box.sh
var boxInit string

// NewBox makes a box of a machine of the network, with a disk of so many bytes.
func (l *Lab) NewBox(ctx context.Context, h *Host, disk int64) (*Box, error) {
	b := &Box{Host: h, Lab: l.At(h), dir: l.Path("box-" + h.Name), image: l.Path(h.Name + ".ext4")}
	f, err := os.Create(b.image)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(disk), f.Close(), os.Mkdir(b.dir, 0o711)); err != nil {
		return nil, err
	}
	if _, err := l.Run(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", b.image); err != nil {
		return nil, err
	}
	return b, b.start(ctx)
}

// start runs the first process.
func (b *Box) start(ctx context.Context) error {
	log, err := os.OpenFile(b.Lab.Path("log", b.Name+"-box.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	up := b.Lab.Path(b.Name + ".up")
	if err := os.RemoveAll(up); err != nil {
		return err
	}
	cmd := exec.Command("/bin/sh", "-c", boxInit, "box", b.Lab.Dir, b.image, b.dir, up)
	cmd.Stdout, cmd.Stderr = log, log
	if b.handle, err = cmd.StdinPipe(); err != nil {
		return err
	}
	// Unshareflags has its mounts be private before anything else is done with them.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS, Unshareflags: syscall.CLONE_NEWNS}
	if err := inNetns(b.ns, cmd.Start); err != nil {
		return fmt.Errorf("start box %s: %w", b.Name, err)
	}
	ended := make(chan struct{})
	b.init, b.ended = cmd, ended
	go func() {
		_ = cmd.Wait() // however it ends, the box is gone
		close(ended)
	}()
	b.Lab.OnClose(b.Kill)
	if err := WaitFor(ctx, "box "+b.Name, 30*time.Second, func() error {
		select {
		case <-ended:
			return fmt.Errorf("it has ended; its log ends:\n%s", Tail(log.Name(), 15))
		default:
		}
		_, err := os.Stat(up)
		return err
	}); err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		return err
	}
	b.box = os.NewFile(uintptr(fd), b.Name)
	return nil
}

// Kill ends the box and everything in it, as a power cut would. Its disk stays.
func (b *Box) Kill() error {
	if err := b.init.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-b.ended
	err := b.handle.Close()
	if b.box != nil {
		err = errors.Join(err, b.box.Close())
		b.box = nil
	}
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// Path is where a file of the box, an absolute path, can be had from outside.
func (b *Box) Path(elem ...string) string {
	return filepath.Join(append([]string{"/proc", strconv.Itoa(b.init.Process.Pid), "root"}, elem...)...)
}

// Write writes a file of the box, and makes the directories above it.
func (b *Box) Write(path, content string) error {
	p := b.Path(path)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return err
	}
	return os.WriteFile(p, []byte(content), 0o600)
}

// StartKeptNode starts `shoal keep -- shoal node` in the box, with the config at
// /etc/shoal/node.toml and what `shoal config default node` has for paths and ports.
func (b *Box) StartKeptNode(ctx context.Context) (*Node, error) {
	n := &Node{
		Socket: "/run/shoal/shoal.sock", Control: b.Path("/run/shoal/control.sock"), Root: b.Path("/var/lib/shoal"),
		Metrics: "127.0.0.1:7702", Mirror: "127.0.0.1:7704", MirrorCA: "/var/lib/shoal/mirror-ca.pem", lab: b.Lab,
	}
	shoal, err := b.Lab.program("shoal")
	if err != nil {
		return nil, err
	}
	if n.Process, err = b.Lab.Start(b.Name+"-node", shoal, nil, "keep", "--", shoal, "node"); err != nil {
		return nil, err
	}
	return n, n.waitUp(ctx)
}

// CRI returns clients of a containerd in the box that listens at the default path and
// logs to this file. Nothing is sent until it is used.
func (b *Box) CRI(log string) (*CRI, error) {
	c, err := b.Lab.newCRI(b.Path("/run/containerd/containerd.sock"), log)
	if err == nil {
		b.Lab.OnClose(c.conn.Close)
	}
	return c, err
}

// inBox runs f on a thread that is in the box, and lets the thread end with it. What f
// starts is in the box for good.
func inBox(box *os.File, f func() error) error {
	return onThread(func() error {
		// A thread shares its working directory with others, unless it is told not to.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return err
		}
		if err := unix.Setns(int(box.Fd()), unix.CLONE_NEWNS|unix.CLONE_NEWNET|unix.CLONE_NEWPID|unix.CLONE_NEWUTS); err != nil {
			return fmt.Errorf("enter box %s: %w", box.Name(), err)
		}
		return f()
	})
}
