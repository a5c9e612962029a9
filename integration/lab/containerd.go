package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

// Containerd is a real containerd with a root and a state of its own.
type Containerd struct {
	*Process
	// Address is its gRPC socket.
	Address string
	// Root is its root directory.
	Root string
	// CRI is for what kubelet says to it; nil without ContainerdOptions.CRI.
	CRI *CRI

	lab   *Lab
	o     ContainerdOptions
	ctr   string
	hosts string // directory of hosts.toml files; empty: none
	run   atomic.Int64
}

// StartContainerd starts a containerd below Dir/name.
func (l *Lab) StartContainerd(ctx context.Context, name string, o ContainerdOptions) (*Containerd, error) {
	if o.Binary == "" {
		o.Binary = "containerd"
	}
	if o.ConfigVersion == 0 {
		o.ConfigVersion = 3
	}
	c := &Containerd{lab: l, o: o, Address: l.Path(name, "c.sock"), Root: l.Path(name, "root"), ctr: "ctr"}
	if filepath.IsAbs(o.Binary) {
		c.ctr = filepath.Join(filepath.Dir(o.Binary), c.ctr) // of the same version
	}
	if err := c.configure(name); err != nil {
		return nil, err
	}
	if o.CRI != nil {
		l.OnClose(l.RemoveCgroup)
	}
	if err := c.serve(ctx, name); err != nil {
		return nil, err
	}
	l.OnClose(c.close)
	return c, nil
}

// serve starts the program and waits until it answers.
func (c *Containerd) serve(ctx context.Context, name string) error {
	p, err := c.lab.start(name, c.o.Binary, nil, "--config", c.lab.Path(name, "config.toml"))
	if err != nil {
		return err
	}
	c.Process = p
	err = WaitFor(ctx, "containerd", 60*time.Second, func() error {
		if err := c.Alive(); err != nil {
			return err
		}
		_, err := c.Ctr(ctx, "version")
		return err
	})
	if err == nil && c.o.CRI != nil {
		err = c.dialCRI(ctx)
	}
	if err != nil {
		err = errors.Join(err, c.Stop())
	}
	return err
}

// Restart starts it again, after Stop or Kill. What runs in containers has gone on
// meanwhile.
func (c *Containerd) Restart(ctx context.Context) error { return c.serve(ctx, c.Name) }

// Reconfigure changes the options, for the next Restart.
func (c *Containerd) Reconfigure(change func(*ContainerdOptions)) error {
	change(&c.o)
	return c.configure(c.Name)
}

// close ends it, and its pods before.
func (c *Containerd) close() error {
	var err error
	if c.CRI != nil {
		err = errors.Join(c.CRI.stopPods(), c.CRI.conn.Close())
	}
	return errors.Join(err, c.Stop())
}

// Ctr runs ctr against this containerd and returns its standard output.
func (c *Containerd) Ctr(ctx context.Context, args ...string) (string, error) {
	return c.lab.Run(ctx, c.ctr, append([]string{"--address", c.Address}, args...)...)
}

// Pull pulls ref for a snapshotter, in the way `ctr images pull` does it.
func (c *Containerd) Pull(ctx context.Context, snapshotter, ref string, extra ...string) error {
	args := append([]string{"images", "pull", "--snapshotter", snapshotter}, extra...)
	if c.hosts != "" {
		args = append(args, "--hosts-dir", c.hosts)
	}
	if _, err := c.Ctr(ctx, append(args, ref)...); err != nil {
		return fmt.Errorf("%w\ncontainerd's log ends:\n%s", err, Tail(c.Log, 15))
	}
	return nil
}

// RunReady runs ref until it prints READY, which the lab's images do once they
// serve, or with anyLine until it prints anything or ends. It returns the time
// until then, waits for the container's end (10 seconds at most) and removes it.
func (c *Containerd) RunReady(ctx context.Context, snapshotter, ref string, anyLine bool) (time.Duration, error) {
	path, err := c.lab.program(c.ctr)
	if err != nil {
		return 0, err
	}
	// runc's state is one for all containerds of a machine.
	id := fmt.Sprintf("%s-%s-%d", filepath.Base(c.lab.Dir), c.Name, c.run.Add(1))
	cmd := exec.CommandContext(ctx, path, "--address", c.Address, "run", "--rm", "--snapshotter", snapshotter, ref, id)
	cmd.Env = append(os.Environ(), "PATH="+c.lab.Bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	var ready time.Duration
	var said strings.Builder
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if ready == 0 && (anyLine || strings.HasPrefix(lines.Text(), "READY")) {
			ready = time.Since(began)
			// What was started to serve may go on for ever.
			timer := time.AfterFunc(10*time.Second, func() {
				_, _ = c.Ctr(ctx, "tasks", "kill", "--signal", "SIGKILL", id) // it may have ended just now
			})
			defer timer.Stop()
		}
		if said.Len() < 4<<10 {
			said.WriteString(lines.Text() + "\n")
		}
	}
	_, _ = io.Copy(io.Discard, out) // a line that was too long ended the scan
	err = cmd.Wait()
	if ready == 0 && anyLine && err == nil {
		ready = time.Since(began)
	}
	if ready == 0 || (err != nil && !anyLine) {
		return 0, fmt.Errorf("run %s through %s: no READY (%w)\n%s%s", ref, snapshotter, orSuccess(err), said.String(), stderr.String())
	}
	return ready, nil
}

// Container is a container that runs in the background. Its process is ctr, and
// the process's log is what the container says.
type Container struct {
	*Process
	id string
	c  *Containerd
}

// StartContainer starts a container of ref with a command of its own.
func (c *Containerd) StartContainer(ctx context.Context, name, snapshotter, ref string, args ...string) (*Container, error) {
	id := fmt.Sprintf("%s-%s-%d", filepath.Base(c.lab.Dir), c.Name, c.run.Add(1))
	p, err := c.lab.Start(name, c.ctr, nil, append([]string{"--address", c.Address, "run", "--rm", "--snapshotter", snapshotter, ref, id}, args...)...)
	if err != nil {
		return nil, err
	}
	x := &Container{p, id, c}
	c.lab.OnClose(x.End)
	return x, WaitFor(ctx, "container "+id, time.Minute, func() error {
		if err := p.Alive(); err != nil {
			return err
		}
		_, err := c.Ctr(ctx, "tasks", "metrics", id)
		return err
	})
}

// ID is what containerd calls it, and its snapshot.
func (x *Container) ID() string { return x.id }

// End kills the container and waits for its removal. It may be called more than
// once, and after the container has ended by itself.
func (x *Container) End() error {
	if x.Alive() != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := x.c.Ctr(ctx, "tasks", "kill", "--signal", "SIGKILL", x.id); err != nil {
		return err
	}
	select {
	case <-x.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("container %s was killed and is still there", x.id)
	}
}

// MountImage mounts an image that was pulled, read-only, at dir. The function
// that it returns unmounts it.
func (c *Containerd) MountImage(ctx context.Context, snapshotter, ref, dir string) (unmount func() error, err error) {
	if _, err := c.Ctr(ctx, "images", "mount", "--snapshotter", snapshotter, ref, dir); err != nil {
		return nil, err
	}
	return func() error {
		_, err := c.Ctr(context.WithoutCancel(ctx), "images", "unmount", "--snapshotter", snapshotter, "--rm", dir)
		return err
	}, nil
}
