//go:build kubernetes

package kubernetes

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/lab/cluster"
)

// shoalReady is the node condition ShoalReady, and whether the node has shoal's taint.
type shoalReady struct {
	Status, Reason, Message, LastTransitionTime string
	tainted                                     bool
}

func (s *site) shoalReady(t *testing.T, n *cluster.Node) (*shoalReady, error) {
	t.Helper()
	var node struct {
		Spec   struct{ Taints []struct{ Key string } }
		Status struct {
			Conditions []struct {
				Type string
				shoalReady
			}
		}
	}
	if err := s.Get(contextOf(t), "/api/v1/nodes/"+n.Name, &node); err != nil {
		return nil, err
	}
	tainted := false
	for _, x := range node.Spec.Taints {
		tainted = tainted || x.Key == "shoal.dev/not-ready"
	}
	for _, c := range node.Status.Conditions {
		if c.Type == "ShoalReady" {
			c.tainted = tainted
			return &c.shoalReady, nil
		}
	}
	return &shoalReady{tainted: tainted}, nil
}

// TestWatch runs `shoal-kube watch` beside a real node, containerd and kubelet, as the
// chart's pod does: condition, events of pods, kills of the node, and the taint.
func TestWatch(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	n := s.node(t, "one")
	w := must(n.Lab.Start("watch-"+n.Name, "shoal-kube", nil, "watch", "--kubeconfig", s.Kubeconfig, "--node", n.Name,
		"--grace", "15s", "--taint", "--taint-after", "15s"))(t)
	t.Cleanup(func() {
		if err := w.Stop(); err != nil {
			t.Error(err)
		}
	})
	says := func(status, reason string, tainted bool) (c *shoalReady) {
		t.Helper()
		noError(t, lab.WaitFor(ctx, "condition ShoalReady="+status, 3*time.Minute, func() (err error) {
			if err := w.Alive(); err != nil {
				return err
			}
			c, err = s.shoalReady(t, n)
			if err == nil && (c.Status != status || c.Reason != reason || c.tainted != tainted) {
				err = fmt.Errorf("it is %+v; the log ends:\n%s", c, lab.Tail(w.Log, 5))
			}
			return err
		}))
		return c
	}

	// A pod's image, whose container is what containerd calls the node for.
	s.app(t, "watched", file{name: "data", data: content(77)})
	ref := s.Registry.Addr + "/watched:v1"
	set, _ := s.run(t, "watched", podSpec{node: on(n), container: guest(ref, "IfNotPresent")})
	noError(t, lazy(ctx, n, ref))
	ready := says("True", "Ready", false)
	noError(t, lab.WaitFor(ctx, "the event of a lazy image", time.Minute, func() error {
		all, err := s.Events(ctx, set.namespace, set.first())
		for _, e := range all {
			if strings.HasPrefix(e, "ImageLazy: ") && strings.Contains(e, ref) {
				return nil
			}
		}
		return fmt.Errorf("events %q, %w; the log ends:\n%s", all, err, lab.Tail(w.Log, 5))
	}))

	// A node that is killed is back at once: nothing changes.
	for range 5 {
		must(n.Shoal.KillNode(ctx))(t)
		wait(ctx, 3*time.Second)
	}
	if c := says("True", "Ready", false); c.LastTransitionTime != ready.LastTransitionTime {
		t.Errorf("the condition has changed while the node was killed: %+v, and before %+v", c, ready)
	}

	// A node that hangs keeps pods off.
	pid := must(n.Shoal.Child())(t)
	noError(t, syscall.Kill(pid, syscall.SIGSTOP))
	resume := func() error { return syscall.Kill(pid, syscall.SIGCONT) }
	t.Cleanup(func() { _ = resume() }) // it is not stopped any more
	says("False", "NodeSilent", true)
	noError(t, resume())
	says("True", "Ready", false)
	set.ready(t)
}
