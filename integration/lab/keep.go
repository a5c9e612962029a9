package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// StartKeptNode is StartNode under `shoal keep`. The Process is that of keep, so
// Stop ends both; the node is what Child and KillNode are about.
func (l *Lab) StartKeptNode(ctx context.Context, name, supernode, extra string, env ...string) (*Node, error) {
	n, cfg, err := l.prepareNode(name, supernode, extra)
	if err != nil {
		return nil, err
	}
	n.program = l.Path(name, "shoal")
	shoal, err := l.program("shoal")
	if err != nil {
		return nil, err
	}
	if err := n.Install(shoal); err != nil {
		return nil, err
	}
	n.Process, err = l.Start(name, "shoal", env, "keep", "--start-timeout", "20s", "--", n.program, "node", "--config", cfg)
	if err != nil {
		return nil, err
	}
	return n, n.waitUp(ctx)
}

// Install puts another program where keep takes the next one from.
func (n *Node) Install(program string) error {
	tmp := n.program + ".new"
	if err := os.MkdirAll(filepath.Dir(tmp), 0o700); err != nil {
		return err
	}
	if err := os.Symlink(program, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, n.program)
}

// Child is the process id of the node that keep has started, 0 between two of
// them.
func (n *Node) Child() (int, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", n.Pid()))
	if err != nil {
		return 0, err
	}
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			continue // a thread that ended
		}
		for _, f := range strings.Fields(string(b)) {
			return strconv.Atoi(f)
		}
	}
	return 0, nil
}

// KillNode kills the node under keep, as a crash would, and returns its pid.
func (n *Node) KillNode(ctx context.Context) (pid int, err error) {
	err = WaitFor(ctx, "a node under keep", 30*time.Second, func() error {
		if err := n.Alive(); err != nil {
			return err
		}
		if pid, err = n.Child(); err == nil && pid == 0 {
			err = fmt.Errorf("keep has no child just now")
		}
		if err == nil {
			err = syscall.Kill(pid, syscall.SIGKILL)
		}
		return err
	})
	return pid, err
}

// Upgrade has keep replace the node by what has been installed, and waits until
// keep says how that went: with ok, or with the old program started again.
func (n *Node) Upgrade(ctx context.Context) (ok bool, err error) {
	const done, failed = "msg=upgraded", "the upgrade failed"
	before, err := os.ReadFile(n.Log)
	if err != nil {
		return false, err
	}
	if err := n.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
		return false, err
	}
	err = WaitFor(ctx, "upgrade", time.Minute, func() error {
		if err := n.Alive(); err != nil {
			return err
		}
		now, err := os.ReadFile(n.Log)
		if err != nil {
			return err
		}
		said := string(now[len(before):])
		ok = strings.Contains(said, done)
		if !ok && !strings.Contains(said, failed) {
			return fmt.Errorf("keep has not said that it is over")
		}
		return nil
	})
	return ok, err
}
