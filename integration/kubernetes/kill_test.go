//go:build kubernetes

package kubernetes

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/lab/cluster"
	"github.com/shoalfs/shoal/integration/report"
)

// TestKill kills the node's programs and the supernode, one after the other and all at
// once, under a pod with probes, and after each time reads files that nothing has read
// before, by exec. The node prefetches so slowly that bytes are missing for some minutes.
func TestKill(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	n := s.node(t, "slow")
	s.forget(t, n)
	image := server(s.real, "python-django", "v1")
	ref := image["image"].(string)
	image["livenessProbe"] = object{
		"exec": object{"command": []string{"sh", "-c", "ls /usr/lib >/dev/null"}}, "periodSeconds": 2, "timeoutSeconds": 5,
	}
	kills := s.kills(t, n)
	rounds := rounds(t, 2*len(kills))
	want := s.sums(t, ref, rounds)
	s.warm(t, ref)
	set, _ := s.run(t, "kill", podSpec{node: on(n), container: image})
	noError(t, lazy(ctx, n, ref))
	must(set.exec(t, "true"))(t)

	wrong, failed := 0, 0
	before := s.failedProbes(t, set, n)
	for i := range rounds {
		kubelet := n.Kubelet.Pid()
		noError(t, kills[i%len(kills)]())
		noError(t, n.WaitContainerd(ctx))
		noError(t, n.Kubelet.Alive())
		// kubelet answers when exec goes through it.
		var got string
		noError(t, lab.WaitFor(ctx, "exec after a kill", 5*time.Minute, func() (err error) {
			got, err = set.exec(t, "sh", "-c", sumOf(i, rounds))
			return err
		}))
		if got != want[i] {
			t.Errorf("round %d: the files have the sum %q, want %q", i, got, want[i])
			wrong++
		}
		must(s.Kubectl(ctx, "logs", set.first()))(t)
		wait(ctx, 3*time.Second) // so that probes come
		if n.Kubelet.Pid() != kubelet {
			before = 0 // kubelet counts from its start on
		}
		now := s.failedProbes(t, set, n)
		failed, before = failed+now-before, now
	}
	set.ready(t)
	st := must(s.Pod(ctx, set.namespace, set.first()))(t)
	if failed > 0 {
		for _, e := range must(s.Events(ctx, set.namespace, set.first()))(t) {
			t.Log(e)
		}
	}
	const what = "kill -9 of node, containerd, kubelet, supernode, in turn and together"
	figure(t, what+": rounds", "", "", 0, float64(rounds))
	for _, c := range []struct {
		of    string
		count int
	}{{"restarts", st.Restarts()}, {"failed probes", failed}, {"wrong bytes", wrong}} {
		figure(t, what+": "+c.of, "", report.AtMost, 0, float64(c.count))
		if c.count > 0 {
			t.Errorf("%s: %d", c.of, c.count)
		}
	}
}

// rounds is how often something is killed: SHOAL_ROUNDS, or the short number.
func rounds(t *testing.T, short int) int {
	t.Helper()
	s := os.Getenv("SHOAL_ROUNDS")
	if s == "" {
		return short
	}
	return must(strconv.Atoi(s))(t)
}

// kills are the ways to kill what n needs; what was killed is started again.
func (s *site) kills(t *testing.T, n *cluster.Node) []func() error {
	ctx := t.Context()
	shoal := func() error { _, err := n.Shoal.KillNode(ctx); return err } // keep starts it again
	supernode := func() error {
		if err := s.Supernode.Kill(); err != nil {
			return err
		}
		again, err := s.Control.Lab.RestartSupernode(ctx, s.Supernode)
		if err == nil {
			*s.Supernode = *again
		}
		return err
	}
	return []func() error{
		shoal,
		func() error { return restart(n.Containerd) },
		func() error { return restart(n.Kubelet) },
		supernode,
		func() error {
			for _, kill := range []func() error{n.Kubelet.Kill, n.Containerd.Kill, shoal, supernode} {
				if err := kill(); err != nil {
					return err
				}
			}
			if err := n.Containerd.Restart(); err != nil {
				return err
			}
			if err := n.WaitContainerd(ctx); err != nil {
				return err
			}
			return n.Kubelet.Restart()
		},
	}
}

// restart kills a program and starts it again.
func restart(s *cluster.Service) error {
	if err := s.Kill(); err != nil {
		return err
	}
	return s.Restart()
}

// sumOf is a command line that prints the sum of every rounds-th file, from the i-th on.
func sumOf(i, rounds int) string {
	return fmt.Sprintf("find /usr/lib /usr/share -type f | sort | awk 'NR %% %d == %d' | tr '\\n' '\\0' | xargs -0 cat | md5sum", rounds, i)
}

// sums are what sumOf prints in a container on overlayfs.
func (s *site) sums(t *testing.T, ref string, rounds int) (all []string) {
	t.Helper()
	set, _ := s.run(t, "sums", podSpec{node: on(s.node(t, "plain-one")), container: object{"image": ref, "command": []string{"sleep", "3600"}}})
	for i := range rounds {
		all = append(all, must(set.exec(t, "sh", "-c", sumOf(i, rounds)))(t))
	}
	noError(t, set.remove(t))
	return all
}

// failedProbes is how many probes of the first pod have failed since its kubelet's start.
// A probe that could not be made, because containerd was away, has not.
func (s *site) failedProbes(t *testing.T, set *pods, n *cluster.Node) (count int) {
	t.Helper()
	text := must(s.Kubectl(t.Context(), "get", "--raw", "/api/v1/nodes/"+n.Name+"/proxy/metrics/probes"))(t)
	probes := 0
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "prober_probe_total{") || !strings.Contains(line, fmt.Sprintf("pod=%q", set.first())) {
			continue
		}
		fields := strings.Fields(line)
		value := int(must(strconv.ParseFloat(fields[len(fields)-1], 64))(t))
		probes += value
		if strings.Contains(line, `result="failed"`) {
			count += value
		}
	}
	if probes == 0 {
		t.Fatalf("kubelet has made no probe of %s:\n%s", set.first(), text)
	}
	return count
}
