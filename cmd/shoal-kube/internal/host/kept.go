package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// logPath is where a node without systemd logs.
	logPath = "/var/log/shoal-node.log"
	// tail is how many bytes of the log an error shows.
	tail = 2 << 10
)

// kept is a node that shoal keep runs, on a machine without systemd.
type kept struct {
	m     *Machine
	shoal string
}

func (k *kept) pid(context.Context) (int, error) {
	_, pid, err := k.find()
	return pid, err
}

// find returns the processes of keep and of its node; 0: there is none. While keep replaces
// the node, there are two; then it is the older one.
func (k *kept) find() (keep, node int, err error) {
	var nodes []int
	err = processes(func(pid int, args []string) error {
		switch {
		case len(args) < 2 || filepath.Base(args[0]) != "shoal":
		case args[1] == "keep" && !slices.Contains(args, "--launch") && slices.Contains(args, "node"):
			keep = pid
		case args[1] == "node":
			nodes = append(nodes, pid)
		}
		return nil
	})
	if err != nil {
		return 0, 0, err
	}
	first := 0
	for _, pid := range nodes {
		parent, started := origin(pid)
		if parent == keep && keep != 0 && (node == 0 || started < first) {
			node, first = pid, started
		}
	}
	return keep, node, nil
}

// processes calls f for each process of the machine that is not a container's, with its
// arguments.
func processes(f func(pid int, args []string) error) error {
	mine, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, dir := range all {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if ns, err := os.Readlink(dir + "/ns/mnt"); err != nil || ns != mine {
			continue
		}
		b, err := os.ReadFile(dir + "/cmdline")
		if err != nil {
			continue // it has ended
		}
		if err := f(pid, strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")); err != nil {
			return err
		}
	}
	return nil
}

// origin is the parent of a process, and when it was started, in clock ticks; 0: it has
// ended.
func origin(pid int) (parent, started int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0
	}
	// pid (name) state ppid, and the name may be anything. The start is number 22.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 20 {
		return 0, 0
	}
	parent, err = strconv.Atoi(fields[1])
	if err != nil {
		return 0, 0
	}
	started, err = strconv.Atoi(fields[19])
	if err != nil {
		return 0, 0
	}
	return parent, started
}

func (k *kept) start(ctx context.Context) error {
	if keep, _, err := k.find(); err != nil || keep != 0 {
		return err // it starts the node by itself
	}
	if set, err := k.settings(); err == nil {
		if _, err := k.m.run(ctx, k.shoal, "status", "--control", set.ControlAddress); err == nil {
			return errors.New("a node runs on this machine that shoal keep did not start: stop the node, and let this program start it")
		}
	}
	// What the unit file does. The node's log says if something is missing.
	_, _ = k.m.run(ctx, "modprobe", "-a", "erofs", "fuse")
	return k.m.background(k.shoal, "keep", "--", k.shoal, "node", "--config", k.m.etc("node.toml"))
}

func (k *kept) settings() (settings, error) {
	b, err := os.ReadFile(k.m.etc("node.toml"))
	if err != nil {
		return settings{}, err
	}
	return readSettings(string(b))
}

// environment is that of the node, with its proxies: what systemd reads of the same file.
func (m *Machine) environment() ([]string, error) {
	env := []string{path}
	b, err := os.ReadFile(m.etc("env"))
	if errors.Is(err, os.ErrNotExist) {
		return env, nil
	}
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if name, value, ok := strings.Cut(line, "="); ok && !strings.HasPrefix(line, "#") {
			env = append(env, name+"="+strings.Trim(value, `"'`))
		}
	}
	return env, err
}

func (k *kept) restart(ctx context.Context) error {
	keep, before, err := k.find()
	if err != nil {
		return err
	}
	if keep == 0 {
		return k.start(ctx)
	}
	want, err := sumOf(k.shoal)
	if err != nil {
		return err
	}
	if err := syscall.Kill(keep, syscall.SIGUSR2); err != nil {
		return fmt.Errorf("shoal keep (process %d): %w", keep, err)
	}
	for {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("shoal keep (process %d) has not started the new program: %w", keep, ctx.Err())
		}
		_, node, err := k.find()
		if err != nil {
			return err
		}
		if node == 0 || node == before {
			continue
		}
		sum, err := sumOf(fmt.Sprintf("/proc/%d/exe", node))
		switch {
		case err != nil: // it has ended
		case sum == want:
			return nil
		default:
			return errors.New("the new program did not get ready, so shoal keep started the old one again")
		}
	}
}

func (k *kept) stop(ctx context.Context) error {
	keep, _, err := k.find()
	if err != nil || keep == 0 {
		return err
	}
	if err := syscall.Kill(keep, syscall.SIGTERM); err != nil {
		return err
	}
	for {
		if now, _, err := k.find(); err != nil || now != keep {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("shoal keep (process %d) does not end: %w", keep, ctx.Err())
		}
	}
}

func (k *kept) said(context.Context) string {
	b, err := os.ReadFile(logPath)
	if err != nil {
		return fmt.Sprintf("(%v)", err)
	}
	return strings.TrimSpace(string(b[max(0, len(b)-tail):]))
}
