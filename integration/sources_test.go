package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/internal/control"
)

// noise is n bytes that do not compress.
func noise(seed uint64, n int) string {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	_, _ = r.Read(b) // never fails
	return string(b)
}

// noisy is a layer of one file of n megabytes that do not compress.
func noisy(t *testing.T, name string, seed uint64, megabytes int) (lab.Blob, string) {
	t.Helper()
	data := noise(seed, megabytes<<20)
	return layer(t, file(name, data)), data
}

// expectFile reads a file and compares.
func expectFile(t *testing.T, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Errorf("read: %v", err)
	} else if string(got) != want {
		t.Errorf("%s has other bytes than were pushed", path)
	}
}

// nodeMetric reads one of the node's metrics.
func (s *site) nodeMetric(t *testing.T, name string) float64 {
	t.Helper()
	return must(s.node.Metric(t.Context(), name))(t)
}

// wipe deletes all that a supernode has but its identity.
func wipe(root string) error {
	entries, err := os.ReadDir(root)
	for _, e := range entries {
		if e.Name() != "identity" {
			err = errors.Join(err, os.RemoveAll(filepath.Join(root, e.Name())))
		}
	}
	return err
}

// TestRegistryIsTheLastSource: the supernode goes away, by dying or by not
// answering any more, before a byte of an image has been read. The containers
// get right bytes, from the registry.
func TestRegistryIsTheLastSource(t *testing.T) {
	for name, goAway := range map[string]func(*lab.Supernode) error{
		"killed": (*lab.Supernode).Kill,
		"silent": func(s *lab.Supernode) error { return syscall.Kill(s.Pid(), syscall.SIGSTOP) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, `read_timeout = "10s"`)
			one, a := noisy(t, "a", 1, 12)
			two, b := noisy(t, "b", 2, 12)
			ref := s.push(t, "app", one, two)
			if err := s.Pull(t.Context(), "shoal", ref); err != nil {
				t.Fatal(err)
			}
			if err := goAway(s.supernode); err != nil {
				t.Fatal(err)
			}
			view := s.mountImage(t, "shoal", ref)
			expectFile(t, filepath.Join(view, "b"), b)
			expectFile(t, filepath.Join(view, "a"), a)
			if n := s.nodeMetric(t, "shoal_node_demand_failures_total"); n != 0 {
				t.Errorf("%v reads failed", n)
			}
			if n := s.nodeMetric(t, "shoal_node_registry_bytes_total"); n < 24<<20 {
				t.Errorf("%v bytes came from the registry, the layers have 24 MiB", n)
			}
			if name == "silent" {
				if err := syscall.Kill(s.supernode.Pid(), syscall.SIGCONT); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestSupernodeWiped: a supernode that has lost all it had gets layers again when
// a node asks for their chunks, and the node asks no registry itself.
func TestSupernodeWiped(t *testing.T) {
	s := newSite(t, "")
	one, a := noisy(t, "a", 3, 12)
	ref := s.push(t, "app", one)
	if err := s.Pull(t.Context(), "shoal", ref); err != nil {
		t.Fatal(err)
	}
	if err := s.supernode.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := wipe(s.Path("super")); err != nil {
		t.Fatal(err)
	}
	s.supernode = must(s.RestartSupernode(t.Context(), s.supernode))(t)
	if err := lab.WaitFor(t.Context(), "the node connected again", 20*time.Second, func() error {
		log, err := os.ReadFile(s.node.Log)
		if n := strings.Count(string(log), "msg=connected"); err == nil && n < 2 {
			err = fmt.Errorf("connected %d times", n)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	expectFile(t, filepath.Join(s.mountImage(t, "shoal", ref), "a"), a)
	if n := s.nodeMetric(t, "shoal_node_demand_failures_total"); n != 0 {
		t.Errorf("%v reads failed", n)
	}
	if n := s.nodeMetric(t, "shoal_node_registry_bytes_total"); n != 0 {
		t.Errorf("%v bytes came to the node from the registry, which the supernode is to ask", n)
	}
}

// TestEverythingIsDown: with supernode and registry gone, what is cached goes on
// being read and starts anew, also after a restart of the node; what is not gives
// EIO in time, and a line in the log that says all.
func TestEverythingIsDown(t *testing.T) {
	s := newSite(t, `read_timeout = "3s"`)
	ctx := t.Context()
	cached, a := noisy(t, "a", 4, 4)
	cold, _ := noisy(t, "b", 5, 4)
	good, bad := s.push(t, "cached", cached), s.push(t, "cold", cold)
	for _, ref := range []string{good, bad} {
		if err := s.Pull(ctx, "shoal", ref); err != nil {
			t.Fatal(err)
		}
	}
	running := s.mountImage(t, "shoal", good)
	if err := s.node.WaitLocal(ctx, good, time.Minute); err != nil {
		t.Fatal(err)
	}
	for _, kill := range []func() error{s.supernode.Kill, s.registry.Kill} {
		if err := kill(); err != nil {
			t.Fatal(err)
		}
	}
	expectFile(t, filepath.Join(running, "a"), a)
	expectFile(t, filepath.Join(s.mountImage(t, "shoal", good), "a"), a)
	began := time.Now()
	_, err := os.ReadFile(filepath.Join(s.mountImage(t, "shoal", bad), "b"))
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("read of what is nowhere: %v, want EIO", err)
	}
	// The kernel may try a failed page once more on its own.
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("EIO after %v, read_timeout is 3s", took)
	}
	line := logLine(t, s.node.Log, bad)
	for _, want := range []string{"the process gets EIO", "layer=" + cold.Digest, "offset=", "supernode", "cannot connect", "registry", "connection refused"} {
		if !strings.Contains(line, want) {
			t.Errorf("the line does not say %q: %s", want, line)
		}
	}
	if n := s.nodeMetric(t, "shoal_node_demand_failures_total"); n == 0 {
		t.Error("no failed read counted")
	}
	st := s.state(t)
	if st.NoSupernode == "" || time.Since(st.Called) > time.Hour {
		t.Errorf("the node says of itself: %+v", st)
	}
	notice(t, st, control.Lazy, good)
	notice(t, st, control.Lazy, bad)
	if n := notice(t, st, control.ReadFailed, bad); !strings.Contains(n.Why, "connection refused") || n.Layer == "" {
		t.Errorf("the notice of the failed read: %+v", n)
	}
	if n := s.nodeMetric(t, `shoal_node_reads_in_flight`); n != 0 {
		t.Errorf("%v reads are still in flight", n)
	}
}

// TestSlowSupernode: over a link that is much too slow, every read ends with right
// bytes.
func TestSlowSupernode(t *testing.T) {
	s := &site{Lab: newLab(t)}
	ctx := t.Context()
	s.registry = must(s.StartRegistry(ctx, "registry", s.Path("images"), ""))(t)
	s.supernode = must(s.StartSupernode(ctx, "super", ""))(t)
	slow := must(s.NewLink(s.supernode.HostPort(), lab.Rate(512<<10), 20*time.Millisecond))(t)
	s.node = must(s.StartNode(ctx, "node", s.supernode.Via(slow), `read_timeout = "20s"`))(t)
	s.Containerd = must(s.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{Shoal: s.node.Socket}))(t)
	one, a := noisy(t, "a", 6, 4)
	ref := s.push(t, "app", one)
	if err := s.Pull(ctx, "shoal", ref); err != nil {
		t.Fatal(err)
	}
	expectFile(t, filepath.Join(s.mountImage(t, "shoal", ref), "a"), a)
	if n := s.nodeMetric(t, "shoal_node_demand_failures_total"); n != 0 {
		t.Errorf("%v reads failed", n)
	}
}

// stopContext is for what is put right after a test, when its own has ended.
func stopContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestDrillSourcesAway takes the supernode, the registry, or both away for seconds,
// and the supernode's store for ever. Containers that run, and what is cached, never
// notice, and containers of it start; what was still being fetched is read to its
// end.
func TestDrillSourcesAway(t *testing.T) {
	s := newKeptSite(t, 16<<20)
	ctx := t.Context()
	d := &tally{drill: "supernode killed, wiped, registry down, both", rounds: min(rounds(t, 4), 16)}
	l := s.startLoad(t)
	noError(t, s.node.WaitLocal(ctx, l.ref, 2*time.Minute))
	_, here := s.pullFiles(t, "here", 1, 32, 300_000)
	local := lab.StartReaders(2, here)
	l.goOn(t)
	notStarted := 0
	for i := range d.rounds {
		_, coming := s.pullFiles(t, fmt.Sprint("coming", i), uint64(1000*(i+1)), 16, 1_000_000)
		slow := lab.StartReaders(2, coming)
		local.Longest()
		wait(ctx, rand.N(500*time.Millisecond))
		back := s.takeAway(t, i%4)
		if _, err := s.RunReady(ctx, "shoal", l.ref, true); err != nil {
			t.Log(err)
			notStarted++
		}
		wait(ctx, rand.N(2*time.Second))
		back()
		noError(t, goOn(ctx, slow, 20))
		d.pauses = append(d.pauses, local.Longest())
		d.end(slow)
		for _, f := range coming {
			d.file(f.Path, string(f.Data))
		}
	}
	l.goOn(t)
	d.end(local)
	l.into(t, d)
	d.rows(t)
	count(t, d.drill+": containers of cached images that did not start", notStarted)
}

// takeAway kills what the node gets bytes from; back brings it again.
func (s *keptSite) takeAway(t *testing.T, what int) (back func()) {
	t.Helper()
	super, registry := what != 2, what >= 2
	if super {
		noError(t, s.supernode.Kill())
	}
	if registry {
		noError(t, s.registry.Kill())
	}
	if what == 1 {
		noError(t, wipe(s.Path("super")))
	}
	return func() {
		if registry {
			s.registry = must(s.RestartRegistry(t.Context(), s.registry))(t)
		}
		if super {
			s.supernode = must(s.RestartSupernode(t.Context(), s.supernode))(t)
		}
	}
}

// TestNodesRestoreSupernode: a supernode that has lost all it had gets a layer from
// a node that has it, not from the registry.
func TestNodesRestoreSupernode(t *testing.T) {
	s := newSite(t, "")
	one, a := noisy(t, "a", 3, 12)
	ref := s.push(t, "app", one)
	if err := s.Pull(t.Context(), "shoal", ref); err != nil {
		t.Fatal(err)
	}
	s.mountImage(t, "shoal", ref)                                // the rest follows once somebody uses it
	noError(t, s.node.WaitProven(t.Context(), ref, time.Minute)) // it has the tar headers, too
	noError(t, s.supernode.Kill())
	noError(t, wipe(s.Path("super")))
	s.supernode = must(s.RestartSupernode(t.Context(), s.supernode))(t)
	noError(t, lab.WaitFor(t.Context(), "the node in its group again, with all of the image", 20*time.Second, func() error {
		n, err := s.supernode.Metric(t.Context(), "shoal_supernode_holders")
		if err == nil && n < 1 {
			err = fmt.Errorf("%v holders", n)
		}
		return err
	}))
	second := must(s.StartNode(t.Context(), "second", s.supernode.Address, ""))(t)
	im := must(s.registry.Image(t.Context(), "app", "v1"))(t)
	noError(t, second.Pull(t.Context(), im))
	unmount := must(second.Mount(t.Context(), im, "view", s.Path("view")))(t)
	expectFile(t, filepath.Join(s.Path("view"), "a"), a)
	noError(t, unmount())
	for name, want := range map[string]float64{"shoal_supernode_layer_restores_total": 1, `shoal_supernode_layer_ingests_total{outcome="ok"}`: 0} {
		if n, err := s.supernode.Metric(t.Context(), name); want > 0 && (err != nil || n != want) || want == 0 && err == nil && n > 0 {
			t.Errorf("%s: %v (%v), want %v", name, n, err, want)
		}
	}
}
