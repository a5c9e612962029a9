package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// memoryGroup is a cgroup with a limit of its memory, of version 1 or 2.
type memoryGroup struct {
	dir string // of the group
	was string // the file that takes a process back to where it came from
	v2  bool
}

// newMemoryGroup makes one; the test skips where that is not possible.
func newMemoryGroup(t *testing.T, limit int64) *memoryGroup {
	t.Helper()
	base, controller, file := "/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes"
	g := &memoryGroup{}
	if _, err := os.Stat(filepath.Join(base, file)); err != nil {
		base, controller, file, g.v2 = "/sys/fs/cgroup", "", "memory.max", true
		// Children have the controller only where it is handed down.
		if err := os.WriteFile(filepath.Join(base, "cgroup.subtree_control"), []byte("+memory"), 0o600); err != nil {
			t.Skipf("the memory controller of cgroups is not to be had: %v", err)
		}
	}
	for line := range strings.Lines(string(must(os.ReadFile("/proc/self/cgroup"))(t))) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && f[1] == controller {
			g.was = filepath.Join(base, f[2], "cgroup.procs")
		}
	}
	g.dir = filepath.Join(base, "shoal-test-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		t.Skipf("cannot make a memory cgroup here: %v", err)
	}
	t.Cleanup(func() {
		if err := lab.WaitFor(stopContext(t), "cgroup removed", 20*time.Second, func() error { return os.Remove(g.dir) }); err != nil {
			t.Error(err)
		}
	})
	g.put(t, filepath.Join(g.dir, file), strconv.FormatInt(limit, 10))
	return g
}

func (g *memoryGroup) put(t *testing.T, file, value string) {
	t.Helper()
	noError(t, os.WriteFile(file, []byte(value), 0o600))
}

// within has what f starts be born in the group: where the test is at that time.
func (g *memoryGroup) within(t *testing.T, f func()) {
	t.Helper()
	self := strconv.Itoa(os.Getpid())
	g.put(t, filepath.Join(g.dir, "cgroup.procs"), self)
	defer g.put(t, g.was, self)
	f()
}

// kills is how many processes of the group were killed for want of memory.
func (g *memoryGroup) kills(t *testing.T) int {
	t.Helper()
	file := "memory.oom_control"
	if g.v2 {
		file = "memory.events"
	}
	for line := range strings.Lines(string(must(os.ReadFile(filepath.Join(g.dir, file)))(t))) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return must(strconv.Atoi(strings.TrimSpace(n)))(t)
		}
	}
	t.Fatalf("%s does not say how many were killed", file)
	return 0
}

// most is the most that the group has had, in bytes.
func (g *memoryGroup) most(t *testing.T) float64 {
	t.Helper()
	file := "memory.max_usage_in_bytes"
	if g.v2 {
		file = "memory.peak"
	}
	return must(strconv.ParseFloat(strings.TrimSpace(string(must(os.ReadFile(filepath.Join(g.dir, file)))(t))), 64))(t)
}

// TestDrillMemoryLimit: in a cgroup of 256 MiB, a node that prefetches and serves
// reads at full rate is not killed.
func TestDrillMemoryLimit(t *testing.T) {
	group := newMemoryGroup(t, 256<<20)
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	d := &tally{drill: "cgroup of 256 MiB, prefetch and demand at full rate", rounds: min(rounds(t, 1), 3)}
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	group.within(t, func() { s.node = must(s.StartNode(ctx, "node", s.supernode.Address, ""))(t) })
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	for i := range d.rounds {
		var layers []lab.Blob
		var content []string
		for j := range 4 {
			one, data := noisy(t, fmt.Sprintf("f%d", j), uint64(6000+4*i+j), 96)
			layers, content = append(layers, one), append(content, data)
		}
		ref := s.push(t, fmt.Sprint("app", i), layers...)
		noError(t, s.Pull(ctx, "shoal", ref))
		view := s.mountImage(t, "shoal", ref)
		var wg sync.WaitGroup
		for j := range content {
			wg.Go(func() { d.file(filepath.Join(view, fmt.Sprintf("f%d", j)), content[j]) })
		}
		wg.Wait()
		d.add(0, s.node.WaitLocal(ctx, ref, 2*time.Minute))
	}
	if log := string(must(os.ReadFile(s.node.Log))(t)); !strings.Contains(log, "memory is limited by the cgroup") {
		t.Error("the node has not found the limit of its cgroup")
	}
	d.rows(t)
	count(t, d.drill+": killed for want of memory", group.kills(t))
	_, peak, err := s.node.RSS()
	noError(t, err)
	figure(t, d.drill+": peak RSS of the node", "MiB", "", 0, float64(peak>>20))
	figure(t, d.drill+": most in the cgroup, page cache included", "MiB", "", 0, group.most(t)/(1<<20))
}
