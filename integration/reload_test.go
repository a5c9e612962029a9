package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestReloadSupernodes: while a container reads what is not on its node yet, a second
// supernode is added by reload, the first one taken out by another, and stopped. Reads go
// on, and none goes to the registry.
func TestReloadSupernodes(t *testing.T) {
	s := newRig(t, "prefetch = \"none\"\n", "")
	ctx := t.Context()
	const files = 30
	var layers []lab.Blob
	for i := range files {
		layers = append(layers, layer(t, file(fmt.Sprintf("f%d", i), bigContent(i))))
	}
	must(s.registry.Push(ctx, "app", "v1", []string{"/bin/true"}, layers...))(t)
	im := must(s.registry.Image(ctx, "app", "v1"))(t)
	noError(t, s.node.Pull(ctx, im))
	dir := s.Path("view")
	unmount := must(s.node.Mount(ctx, im, "view", dir))(t)
	defer func() { noError(t, unmount()) }()

	// reading reads some files, which nobody has read before, during change.
	next := 0
	reading := func(change func()) {
		t.Helper()
		from, end := next, next+files/5
		next = end
		done := make(chan error, 1)
		go func() {
			for i := from; i < end; i++ {
				got, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("f%d", i)))
				if err == nil && string(got) != bigContent(i) {
					err = fmt.Errorf("f%d has other content than was pushed", i)
				}
				if err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
		change()
		noError(t, <-done)
	}
	reload := func(control, want string) {
		t.Helper()
		if out := must(s.Run(ctx, "shoal", "reload", "--control", control))(t); out != want {
			t.Errorf("reload says %q, want %q", out, want)
		}
	}
	supernodes := func(want string, list ...*lab.Supernode) {
		t.Helper()
		var quoted []string
		for _, n := range list {
			quoted = append(quoted, fmt.Sprintf("%q", n.Address))
		}
		s.configure(t, "node", func(c string) string {
			before, rest, _ := strings.Cut(c, "supernodes = [")
			_, after, _ := strings.Cut(rest, "]")
			return before + "supernodes = [" + strings.Join(quoted, ", ") + "]" + after
		})
		reload(s.node.Control, want)
	}
	joined := func(n *lab.Supernode, want int) {
		t.Helper()
		noError(t, lab.WaitFor(ctx, "members of "+n.Name, 30*time.Second, func() error {
			out, err := s.Run(ctx, "shoal", "members", "--output", "json", "--control", n.Control)
			if got := strings.Count(out, `"member"`); err == nil && got != want {
				err = fmt.Errorf("it has %d, want %d:\n%s", got, want, out)
			}
			return err
		}))
	}

	first := s.supernode
	second := must(s.StartSupernode(ctx, "second", ""))(t)
	reading(func() {
		for _, n := range []*lab.Supernode{first, second} {
			s.configure(t, n.Name, func(c string) string {
				return fmt.Sprintf("siblings = [%q, %q]\n%s", first.Address, second.Address, c)
			})
			reload(n.Control, "changed: siblings\n")
		}
		supernodes("changed: supernodes\n", first, second)
	})
	joined(first, 1)
	joined(second, 1)
	if out := must(s.Run(ctx, "shoal", "status", "--control", s.node.Control))(t); !strings.Contains(out, second.Address) {
		t.Errorf("the node's status does not name the second supernode:\n%s", out)
	}
	reading(func() { supernodes("changed: supernodes\n", second) })
	joined(first, 0)
	joined(second, 1)
	reading(func() { noError(t, first.Stop()) })
	reading(func() {})
	if n := must(s.node.Metric(ctx, "shoal_node_registry_bytes_total"))(t); n != 0 {
		t.Errorf("the node has read %.0f bytes from the registry itself", n)
	}

	// A node that is to have a supernode of its own has to be started again.
	supernodes("needs a restart: supernodes\n")
	logged(t, s.node.Log, "need a restart", "supernodes")
	reading(func() {})
}
