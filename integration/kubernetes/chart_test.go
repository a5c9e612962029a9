//go:build kubernetes

package kubernetes

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/lab/cluster"
	"github.com/shoalfs/shoal/integration/report"
)

// chartPage has the commands that TestChart runs.
const chartPage = "../../docs/kubernetes.md"

// chartSite is a node on overlayfs, and a directory in which the page's commands run.
type chartSite struct {
	*site
	n   *cluster.Node
	dir string
	ref string // the image of the quick start
}

// restartContainerd is for machines without systemd: the test starts it again.
const restartContainerd = `kill $(pidof containerd); sleep 0.3; until ctr version >/dev/null 2>&1; do sleep 0.1; done`

func newChartSite(t *testing.T) *chartSite {
	s := &chartSite{site: newSite(t), ref: "docker.io/library/redis:7"}
	ctx := t.Context()
	s.n = s.node(t, "plain-chart")
	s.dir = s.Path("checkout")
	noError(t, os.Mkdir(s.dir, 0o755))
	noError(t, os.Symlink(must(filepath.Abs("../../deploy"))(t), filepath.Join(s.dir, "deploy")))
	// The page's images come from a registry of the lab, by their own names. All pods of the
	// chart run on this node: the others are cordoned.
	for _, host := range []string{"docker.io", "ghcr.io"} {
		noError(t, s.n.Write("/etc/containerd/certs.d/"+host+"/hosts.toml", s.hosts("")))
	}
	for _, p := range []string{"containerd", "ctr"} {
		must(s.n.Shell(ctx, "ln -sf "+filepath.Join(s.n.Lab.Bin, p)+" /usr/local/bin/"+p))(t)
	}
	layer := must(lab.GzipLayer(makeTar(t, file{name: "data", data: "hello"})))(t)
	must(s.Registry.Push(ctx, "library/redis", "7", []string{"/guest", "pause"}, must(s.Guest())(t), layer))(t)
	noError(t, s.Create(ctx, "/apis/storage.k8s.io/v1/storageclasses", object{
		"metadata":    object{"name": "lab", "annotations": object{"storageclass.kubernetes.io/is-default-class": "true"}},
		"provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "WaitForFirstConsumer",
	}))
	noError(t, s.Create(ctx, "/api/v1/persistentvolumes", object{"metadata": object{"name": "supernode"}, "spec": object{
		"capacity": object{"storage": "300Gi"}, "accessModes": []string{"ReadWriteOnce"}, "storageClassName": "lab",
		"hostPath": object{"path": "/var/lib/volume", "type": "DirectoryOrCreate"},
	}}))
	// The page's pod may run on any node that pods may run on.
	for _, other := range s.Nodes {
		if other != s.n {
			must(s.Kubectl(ctx, "cordon", other.Name))(t)
			t.Cleanup(func() { must(s.Kubectl(contextOf(t), "uncordon", other.Name))(t) })
		}
	}
	s.supervise(t)
	return s
}

// hosts is a hosts.toml that leads to the lab's registry.
func (s *chartSite) hosts(more string) string {
	return fmt.Sprintf("server = %q\n%s", "http://"+s.Registry.Addr, more)
}

// supervise starts containerd again whenever it ends, until the test ends.
func (s *chartSite) supervise(t *testing.T) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
			if s.n.Containerd.Alive() == nil {
				continue
			}
			if err := s.n.Containerd.Restart(); err != nil {
				t.Errorf("start containerd again: %v", err)
				return
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-stopped })
}

// push pushes the image of the chart, whose program has this many bytes more than shoal.
func (s *chartSite) push(t *testing.T, tag string, more int) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range []string{"shoal", "shoal-kube"} {
		data := must(os.ReadFile(filepath.Join(s.Bin, name)))(t)
		if name == "shoal" {
			data = append(data, make([]byte, more)...)
		}
		noError(t, w.WriteHeader(&tar.Header{Name: "usr/local/bin/" + name, Mode: 0o755, Size: int64(len(data)), ModTime: time.Unix(1_700_000_000, 0)}))
		must(w.Write(data))(t)
	}
	noError(t, w.Close())
	must(s.Registry.Push(t.Context(), "shoalfs/shoal", tag, []string{"/usr/local/bin/shoal"}, must(s.Guest())(t), must(lab.GzipLayer(b.Bytes()))(t)))(t)
}

// sh runs a line of the page where the API server is.
func (s *chartSite) sh(t *testing.T, line string) string {
	t.Helper()
	t.Log(line)
	env := fmt.Sprintf("cd %s && export KUBECONFIG=%s HOME=%s PATH=%s:$PATH && ", s.dir, s.Kubeconfig, s.dir, filepath.Join(s.Bin, "kubernetes"))
	return must(s.Control.Lab.Run(contextOf(t), "sh", "-c", env+line))(t)
}

// change makes values of shoal.yaml be what is different in the lab.
func (s *chartSite) change(t *testing.T) {
	t.Helper()
	name := filepath.Join(s.dir, "shoal.yaml")
	text := string(must(os.ReadFile(name))(t))
	registry := fmt.Sprintf("hosts.toml: %q", s.hosts(""))
	for _, c := range [][2]string{
		{"registries: {}", fmt.Sprintf("registries: {docker.io: {%s}, %q: {%s}}", registry, s.Registry.Addr, registry)},
		{"nodeSelector: {}", "nodeSelector: {kubernetes.io/hostname: " + s.n.Name + "}"},
		{`restartCommand: ""`, fmt.Sprintf("restartCommand: %q", restartContainerd)},
	} {
		if !strings.Contains(text, c[0]) {
			t.Fatalf("shoal.yaml has no %q", c[0])
		}
		text = strings.ReplaceAll(text, c[0], c[1])
	}
	noError(t, os.WriteFile(name, []byte(text), 0o600))
}

// TestChart runs the commands of docs/kubernetes.md word by word: install, upgrade,
// rollback and uninstall, on a node that has pods, all of which go on.
func TestChart(t *testing.T) {
	s := newChartSite(t)
	ctx := t.Context()
	s.push(t, "v0.0.0", 0)
	s.push(t, "v0.0.1", 1)
	s.app(t, "chart-before", file{name: "data", data: "before"})
	old, _ := s.run(t, "chart-before", podSpec{node: on(s.n), container: guest(s.Registry.Addr+"/chart-before:v1", "IfNotPresent")})
	hello := &pods{namespace: "default", name: "hello", n: 1, s: s.site}
	restarted := map[string]float64{}
	check := func(when string) {
		t.Helper()
		sum := 0
		for pod, want := range map[string]string{old.first(): "before", "hello": "hello"} {
			out, err := s.Kubectl(ctx, "exec", pod, "--", "/guest", "cat", "/data")
			if err != nil || out != want {
				t.Errorf("%s pod %s reads %q, %v", when, pod, out, err)
			}
			sum += must(s.Pod(ctx, "default", pod))(t).Restarts()
		}
		restarted[when] = float64(sum)
	}
	installed := func(more int) {
		t.Helper()
		want := must(os.Stat(filepath.Join(s.Bin, "shoal")))(t).Size() + int64(more)
		if got := must(os.Stat(s.n.Path("/usr/local/bin/shoal")))(t).Size(); got != want {
			t.Errorf("the node's program has %d bytes, not %d", got, want)
		}
	}

	lines := commands(t, chartPage, "## Quick start")
	began := time.Now()
	for _, line := range lines {
		if strings.Contains(line, "shoal status") {
			hello.ready(t)
			took := time.Since(began).Seconds()
			noError(t, lab.WaitFor(ctx, "a lazy image", time.Minute, func() error {
				if out := s.sh(t, line); !strings.Contains(out, s.ref) {
					return fmt.Errorf("%s is not lazy:\n%s", s.ref, out)
				}
				return nil
			}))
			figure(t, "helm install until the first lazy pod is Ready", "s", report.AtMost, 60, took)
			continue
		}
		s.sh(t, line)
		switch {
		case strings.HasPrefix(line, "helm show values"):
			s.change(t)
			began = time.Now()
		case strings.Contains(line, "rollout status"):
			// What `shoal install containerd` leaves to the owner of a hosts.toml.
			noError(t, s.n.Write("/etc/containerd/certs.d/docker.io/hosts.toml",
				s.hosts("[host.\"https://127.0.0.1:7704\"]\nca = \"/var/lib/shoal/mirror-ca.pem\"\ncapabilities = [\"pull\", \"resolve\"]\n")))
		}
	}
	installed(0)
	check("install")
	noError(t, lab.WaitFor(ctx, "condition ShoalReady", time.Minute, func() error {
		c, err := s.shoalReady(t, s.n)
		if err == nil && c.Status != "True" {
			err = fmt.Errorf("it is %+v", c)
		}
		return err
	}))

	rollout := func() {
		t.Helper()
		s.sh(t, "kubectl --namespace shoal-system rollout status daemonset/shoal-node --timeout 3m")
	}
	lines = commands(t, chartPage, "## Upgrade and rollback")
	if len(lines) != 2 {
		t.Fatalf("the page's upgrade is %q", lines)
	}
	s.sh(t, lines[0]+" --set image.tag=v0.0.1")
	rollout()
	installed(1)
	check("upgrade")
	s.sh(t, lines[1])
	rollout()
	installed(0)
	check("rollback")

	// Without this, containerd pulls nothing from there as soon as the mirror's CA is gone.
	noError(t, s.n.Write("/etc/containerd/certs.d/docker.io/hosts.toml", s.hosts("")))
	s.sh(t, commands(t, chartPage, "## Uninstalling")[0])
	check("uninstall")
	if c := must(s.shoalReady(t, s.n))(t); c.Status != "" || c.tainted {
		t.Errorf("left on the node: %+v", c)
	}
	var sums []float64
	for when, n := range restarted {
		t.Logf("%s: %v restarts", when, n)
		sums = append(sums, n)
	}
	figure(t, "running pods restarted by helm install, upgrade, rollback, uninstall", "", report.AtMost, 0, sums...)
	s.run(t, "chart-after", podSpec{node: on(s.n), container: guest(s.Registry.Addr+"/chart-before:v1", "IfNotPresent")})

	// The pod on the lazy image is removed as any other, and shoal after it.
	s.sh(t, "kubectl delete pod hello --timeout 1m")
	noError(t, lab.WaitFor(ctx, "the removal of shoal", 2*time.Minute, func() error {
		out, err := s.n.Shell(ctx, "ls -d /etc/shoal /usr/local/bin/shoal /var/lib/shoal 2>/dev/null; true")
		if err == nil && strings.TrimSpace(out) != "" {
			err = errors.New(out)
		}
		return err
	}))
}
