//go:build kubernetes

package kubernetes

import (
	"os"
	"path/filepath"
	"regexp"
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
	s.ensureNamespace(t, "shoal-system")
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

// misspelt has a field of each example, and what a slip makes of it.
var misspelt = map[string][2]string{
	"imagecache.yaml":         {"imagePullSecrets:", "imagePullSecret:"},
	"imagepulljob.yaml":       {"timeoutSeconds:", "timeoutSecond:"},
	"model-pod.yaml":          {"subPath:", "subpath:"},
	"prefetch-daemonset.yaml": {"maxUnavailable:", "maxUnavailible:"},
	"prefetch-job.yaml":       {"backoffLimit:", "backofLimit:"},
}

// TestExampleFields: the API server knows each field of each example, and refuses each
// example with a misspelt field. For OpenKruise's it has OpenKruise's own CRD, for
// kube-fledged's the one in testdata.
func TestExampleFields(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	for name, file := range map[string]string{
		"imagepulljobs.apps.kruise.io": filepath.Join(s.Bin, "kubernetes", "kruise", "config", "crd", "bases", "apps.kruise.io_imagepulljobs.yaml"),
		"imagecaches.kubefledged.io":   must(filepath.Abs(filepath.Join("testdata", "imagecache-crd.yaml")))(t),
	} {
		must(s.Kubectl(ctx, "apply", "--validate=strict", "-f", file))(t)
		t.Cleanup(func() { must(s.Kubectl(contextOf(t), "delete", "--wait=false", "crd", name))(t) })
		must(s.Kubectl(ctx, "wait", "--for=condition=Established", "--timeout=1m", "crd/"+name))(t)
	}
	s.ensureNamespace(t, "shoal-system")
	s.ensureNamespace(t, "kube-fledged")
	check := func(dir string) error {
		_, err := s.Kubectl(ctx, "apply", "--dry-run=server", "--validate=strict", "-f", dir)
		return err
	}

	examples := must(filepath.Abs(filepath.Join("..", "..", "deploy", "examples")))(t)
	noError(t, check(examples))

	wrong := t.TempDir()
	for _, f := range must(os.ReadDir(examples))(t) {
		slip, ok := misspelt[f.Name()]
		text := string(must(os.ReadFile(filepath.Join(examples, f.Name())))(t))
		if !ok || !strings.Contains(text, slip[0]) {
			t.Fatalf("misspelt has no field of %s", f.Name())
		}
		noError(t, os.WriteFile(filepath.Join(wrong, f.Name()), []byte(strings.ReplaceAll(text, slip[0], slip[1])), 0o600))
	}
	err := check(wrong)
	if err == nil {
		t.Fatal("the API server takes examples with misspelt fields")
	}
	for name, slip := range misspelt {
		if field := strings.TrimSuffix(slip[1], ":"); !regexp.MustCompile(`unknown field "[^"]*\b` + field + `"`).MatchString(err.Error()) {
			t.Errorf("the API server takes %s with the field %s: %v", name, field, err)
		}
	}
}

// ensureNamespace makes a namespace, which may be there from another test.
func (s *site) ensureNamespace(t *testing.T, name string) {
	t.Helper()
	if _, err := s.Kubectl(t.Context(), "create", "namespace", name); err != nil && !strings.Contains(err.Error(), "AlreadyExists") {
		t.Fatal(err)
	}
}
