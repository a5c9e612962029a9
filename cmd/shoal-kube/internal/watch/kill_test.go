package watch

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/shoalfs/shoal/internal/control"
)

// called is a real node, of which it says that containerd calls it: there is none here.
type called struct {
	control.Client
	asked atomic.Int64
}

func (c *called) State(ctx context.Context, after uint64) (*control.State, error) {
	defer c.asked.Add(1)
	st, err := c.Client.State(ctx, after)
	if err == nil {
		st.Called = time.Now()
	}
	return st, err
}

// TestKill: kill -9 of a node that shoal keep runs does not make the condition flap; the
// end of both does change it.
func TestKill(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a shoal node mounts FUSE: run as root")
	}
	keep, socket := startKept(t)
	client, writes := newFake()
	a := api{admin: client, program: client, forget: client, writes: writes.Load}
	node, c := newNode(t, a), &called{Client: control.Client{Path: socket}}
	stop := run(t, a, node, c, func(c *Config) { c.Poll, c.Grace, c.Taint = 20*time.Millisecond, 5*time.Minute, true })
	says(t, a, node, corev1.ConditionTrue, ReasonReady)
	before := writes.Load()
	for range 5 {
		pid := childOf(t, keep)
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the next node", func() error {
			if now := childOf(t, keep); now == 0 || now == pid {
				return errors.New("it has not been started")
			}
			_, err := c.Client.State(t.Context(), 0)
			return err
		})
		asked := c.asked.Load()
		waitFor(t, "the watch", func() error {
			if c.asked.Load() < asked+3 {
				return errors.New("it has not asked")
			}
			return nil
		})
	}
	says(t, a, node, corev1.ConditionTrue, ReasonReady)
	if n := writes.Load() - before; n != 0 || tainted(t, a, node) {
		t.Errorf("%d writes while the node was killed 5 times; tainted: %v", n, tainted(t, a, node))
	}
	stop()
	if err := keep.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	run(t, a, node, c, func(c *Config) { c.Taint = true })
	says(t, a, node, corev1.ConditionFalse, ReasonNodeDown)
	waitTaint(t, a, node, true)
}

// startKept starts a node with a supernode in it under shoal keep, from SHOAL_BIN, and
// returns keep and the node's control socket.
func startKept(t *testing.T) (keep *exec.Cmd, socket string) {
	t.Helper()
	bin := os.Getenv("SHOAL_BIN")
	if bin == "" {
		bin = "../../../../bin"
	}
	program, err := filepath.Abs(filepath.Join(bin, "shoal"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: run `make build`", err)
	}
	dir := t.TempDir()
	socket = filepath.Join(dir, "c.sock")
	config := filepath.Join(dir, "node.toml")
	text := fmt.Sprintf("version = 1\nroot = %q\naddress = %q\ncontrol_address = %q\nmetrics_address = \"\"\nmirror_address = \"\"\nlisten = []\n",
		filepath.Join(dir, "r"), filepath.Join(dir, "s.sock"), socket)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	keep = exec.Command(program, "keep", "--", program, "node", "--config", config)
	keep.Stdout, keep.Stderr = t.Output(), t.Output()
	if err := keep.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = keep.Process.Signal(syscall.SIGTERM) // it may have ended
		_ = keep.Wait()
		_ = syscall.Unmount(filepath.Join(dir, "r", "fuse"), syscall.MNT_DETACH) // it stays, for the next node
	})
	waitFor(t, "the node", func() error {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
		}
		return err
	})
	return keep, socket
}

// childOf returns the process that keep has started; 0: there is none now.
func childOf(t *testing.T, keep *exec.Cmd) int {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", keep.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // a thread that ended
		}
		for _, f := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	return 0
}
