//go:build kubernetes

package kubernetes

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// example writes a file of deploy/examples, with these words replaced, to where kubectl
// finds it.
func (s *site) example(t *testing.T, name string, replace ...string) (path string) {
	t.Helper()
	text := string(must(os.ReadFile(filepath.Join("..", "..", "deploy", "examples", name)))(t))
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(text, replace[i]) {
			t.Fatalf("%s has no %q", name, replace[i])
		}
	}
	path = s.Path(name)
	noError(t, os.WriteFile(path, []byte(strings.NewReplacer(replace...).Replace(text)), 0o600))
	return path
}

// TestExamples: Kubernetes takes the examples of its own kinds as they are. Job and DaemonSet
// bring every byte of an image to their node before they are complete, and the pod with the
// model starts.
func TestExamples(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	n := s.node(t, "one")
	program := must(os.ReadFile(filepath.Join(s.Bin, "shoal")))(t)
	s.app(t, "shoal", file{name: "usr/local/bin/shoal", data: string(program), mode: 0o755})
	for _, name := range []string{"for-job", "for-set"} {
		s.app(t, name, file{name: "data", data: content(24)})
	}
	s.app(t, "model", file{name: "llama/8b/weights", data: content(8)})
	registry := s.Registry.Addr
	if _, err := s.Kubectl(ctx, "create", "namespace", "shoal-system"); err != nil && !strings.Contains(err.Error(), "AlreadyExists") {
		t.Fatal(err)
	}
	apply := func(path string, wait ...string) {
		t.Helper()
		must(s.Kubectl(ctx, "apply", "-f", path))(t)
		t.Cleanup(func() {
			if _, err := s.Kubectl(contextOf(t), "delete", "--wait", "-f", path); err != nil {
				t.Error(err)
			}
		})
		if _, err := s.Kubectl(ctx, append(wait, "--timeout=5m")...); err != nil {
			out, _ := s.Kubectl(ctx, "get", "events", "-A")
			t.Fatalf("%v\n%s", err, out)
		}
	}
	here := func(ref string) {
		t.Helper()
		local, size, err := n.Shoal.Local(ctx, ref)
		if err != nil || size == 0 || local < size {
			t.Errorf("%d of %d bytes of %s are on the node, %v", local, size, ref, err)
		}
	}
	shoal := registry + "/shoal:v1"
	apply(s.example(t, "prefetch-job.yaml", "ghcr.io/shoalfs/shoal:VERSION", shoal, "NODE", n.Name, "registry.example.com/app:v2", registry+"/for-job:v1"),
		"wait", "-n", "shoal-system", "--for=condition=complete", "job/shoal-prefetch")
	here(registry + "/for-job:v1")
	apply(s.example(t, "prefetch-daemonset.yaml", "ghcr.io/shoalfs/shoal:VERSION", shoal, "registry.k8s.io/pause:3.10", registry+"/pause:v1",
		"registry.example.com/app:v2", registry+"/for-set:v1", ", registry.example.com/model:v1", "",
		"    spec:\n", "    spec:\n      nodeSelector: {kubernetes.io/hostname: "+n.Name+"}\n"),
		"rollout", "status", "-n", "shoal-system", "daemonset/shoal-prefetch")
	here(registry + "/for-set:v1")
	apply(s.example(t, "model-pod.yaml", "registry.example.com/server:v2", registry+"/hello:v1", "registry.example.com/model:v1", registry+"/model:v1",
		"args: [--model, /models/weights.safetensors]", "command: [/guest, pause]",
		"spec:\n", "spec:\n  nodeSelector: {kubernetes.io/hostname: "+n.Name+"}\n  terminationGracePeriodSeconds: 1\n"),
		"wait", "--for=condition=Ready", "pod/inference")
	noError(t, lazy(ctx, n, registry+"/model:v1"))
	if out, err := s.Kubectl(ctx, "exec", "inference", "--", "/guest", "stat", "/models/weights"); err != nil || out != "0:0 /models/weights\n" {
		t.Errorf("the model's file: %q, %v", out, err)
	}
}
