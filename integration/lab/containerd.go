package lab

import (
	"bufio"
	"context"
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

	lab   *Lab
	ctr   string
	hosts string // directory of hosts.toml files; empty: none
	run   atomic.Int64
}

// ContainerdOptions say which containerd is started, and how.
type ContainerdOptions struct {
	// Binary is the program's path; empty: the one in Lab.Bin (2.x).
	Binary string
	// ConfigVersion is 3 for containerd 2.x (the default), 2 for 1.x.
	ConfigVersion int
	// Snapshotters beside overlayfs that images are pulled for: erofs, shoal.
	Snapshotters []string
	// Shoal is the socket of a shoal node to use as a snapshotter; empty: none.
	Shoal string
	// Mirror is the host:port of a node's registry mirror, which Pull asks before
	// the registry; empty: none.
	Mirror string
	// Extra is added to the end of the config file.
	Extra string
}

// StartContainerd starts a containerd below Dir/name.
func (l *Lab) StartContainerd(ctx context.Context, name string, o ContainerdOptions) (*Containerd, error) {
	if o.Binary == "" {
		o.Binary = "containerd"
	}
	ctr := "ctr"
	if filepath.IsAbs(o.Binary) {
		ctr = filepath.Join(filepath.Dir(o.Binary), ctr) // of the same version
	}
	if o.ConfigVersion == 0 {
		o.ConfigVersion = 3
	}
	c := &Containerd{lab: l, Address: l.Path(name, "c.sock"), Root: l.Path(name, "root"), ctr: ctr}
	var b strings.Builder
	fmt.Fprintf(&b, "version = %d\nroot = %q\nstate = %q\n", o.ConfigVersion, l.Path(name, "root"), l.Path(name, "state"))
	// CRI wants a network and a pause image; the lab drives containerd itself.
	fmt.Fprintf(&b, "disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\"]\n")
	fmt.Fprintf(&b, "[grpc]\naddress = %q\n", c.Address)
	if o.Shoal != "" {
		fmt.Fprintf(&b, "[proxy_plugins.shoal]\ntype = \"snapshot\"\naddress = %q\n", o.Shoal)
		if o.ConfigVersion >= 3 {
			fmt.Fprintf(&b, "[proxy_plugins.shoal.exports]\nenable_remote_snapshot_annotations = \"true\"\n")
		}
	}
	if o.ConfigVersion >= 3 {
		names := append([]string{"overlayfs"}, o.Snapshotters...)
		if o.Shoal != "" {
			names = append(names, "shoal")
		}
		for _, s := range names {
			fmt.Fprintf(&b, "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = \"linux/amd64\"\nsnapshotter = %q\ndiffer = \"walking\"\n", s)
		}
	}
	b.WriteString(o.Extra)
	cfg, err := l.writeFile(name+"/config.toml", b.String())
	if err != nil {
		return nil, err
	}
	if o.Mirror != "" {
		hosts := fmt.Sprintf("[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", o.Mirror)
		if _, err := l.writeFile(name+"/certs.d/_default/hosts.toml", hosts); err != nil {
			return nil, err
		}
		c.hosts = l.Path(name, "certs.d")
	}
	if c.Process, err = l.Start(name, o.Binary, nil, "--config", cfg); err != nil {
		return nil, err
	}
	err = WaitFor(ctx, "containerd", 60*time.Second, func() error {
		if err := c.Alive(); err != nil {
			return err
		}
		_, err := c.Ctr(ctx, "version")
		return err
	})
	return c, err
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
