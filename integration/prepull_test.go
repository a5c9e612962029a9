package integration

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	yaml "go.yaml.in/yaml/v3"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/shoalfs/shoal/integration/lab"
)

// isHere fails the test unless every byte of an image is on the node and proven, now.
func (s *site) isHere(t *testing.T, ref string) {
	t.Helper()
	for _, im := range must(s.node.Status(t.Context()))(t).Images {
		if im.Ref != ref {
			continue
		}
		for _, l := range im.Layers {
			if l.Local < l.Size || l.Proof != "proven" {
				t.Errorf("%s: %d of %d bytes of layer %s are here, which is %q", ref, l.Local, l.Size, l.DiffID, l.Proof)
			}
		}
		return
	}
	t.Errorf("shoal status does not list %s", ref)
}

// newPullSite is a CRI site with the mirror, and with the defaults for what is prefetched.
func newPullSite(t *testing.T, nodeConfig string) *site {
	t.Helper()
	return newCRISite(t, pinned(t), nodeConfig, func(s *site, o *lab.ContainerdOptions) { o.Mirror, o.MirrorCA = s.node.Mirror, s.node.MirrorCA })
}

// TestPullWithoutContainer: a pull through CRI, as by crictl or by OpenKruise, brings all
// of an image that images.eager names before it ends, and of others soon after.
func TestPullWithoutContainer(t *testing.T) {
	s := newPullSite(t, asShipped+"[images]\neager = [\"*/eager\"]\n")
	ctx := t.Context()
	one, _ := noisy(t, "f", 81, 24)
	two, _ := noisy(t, "f", 82, 24)
	eager, plain := s.push(t, "eager", must(s.Guest())(t), one), s.push(t, "plain", must(s.Guest())(t), two)
	noError(t, s.CRI.Pull(ctx, eager, nil))
	s.isHere(t, eager)
	noError(t, s.CRI.Pull(ctx, plain, nil))
	noError(t, s.node.WaitProven(ctx, plain, time.Minute))
}

// TestShortContainer: with prefetch_after_exit, a container that ends at once, such as
// kube-fledged's, has all of its image brought to the node.
func TestShortContainer(t *testing.T) {
	s := newPullSite(t, "prefetch_after_exit = true\nprefetch_after_pull = false\n")
	ctx := t.Context()
	one, _ := noisy(t, "f", 83, 24)
	ref := s.push(t, "app", must(s.Guest())(t), one)
	noError(t, s.CRI.Pull(ctx, ref, nil))
	pod := must(s.CRI.RunPod(ctx, "pod", lab.PodOptions{}))(t)
	c := must(pod.Start(ctx, "main", ref, "/guest", "stat", "/"))(t)
	if status := must(c.Wait(ctx, time.Minute))(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	noError(t, pod.Remove(ctx))
	noError(t, s.node.WaitProven(ctx, ref, time.Minute))
}

// podTemplate is what recipes have of a pod.
type podTemplate struct {
	Spec struct {
		RestartPolicy                string
		AutomountServiceAccountToken *bool `yaml:"automountServiceAccountToken"`
		NodeSelector                 map[string]string
		Tolerations                  []map[string]string
		InitContainers               []recipeContainer `yaml:"initContainers"`
		Containers                   []recipeContainer
		Volumes                      []struct {
			Name     string
			HostPath *struct{ Path, Type string } `yaml:"hostPath"`
			Secret   *struct {
				SecretName string `yaml:"secretName"`
				Items      []struct{ Key, Path string }
			}
		}
	}
}

type recipeContainer struct {
	Name, Image   string
	Command, Args []string
	VolumeMounts  []struct {
		Name      string
		MountPath string `yaml:"mountPath"`
		ReadOnly  bool   `yaml:"readOnly"`
	} `yaml:"volumeMounts"`
	SecurityContext map[string]any `yaml:"securityContext"`
}

// recipe reads a file of deploy/examples. Lines that are commented out are for private
// images; private has them.
func recipe(t *testing.T, name string, private bool) podTemplate {
	t.Helper()
	text := string(must(os.ReadFile(filepath.Join("..", "deploy", "examples", name)))(t))
	if private {
		if !strings.Contains(text, "\n        # - name: pull") {
			t.Fatalf("%s has no lines for private images", name)
		}
		for _, indent := range []string{"        ", "            "} {
			text = strings.ReplaceAll(text, "\n"+indent+"# - ", "\n"+indent+"- ")
			text = strings.ReplaceAll(text, "\n"+indent+"#  ", "\n"+indent+" ")
		}
	}
	var file struct {
		Spec struct{ Template podTemplate }
	}
	noError(t, yaml.Unmarshal([]byte(text), &file))
	return file.Spec.Template
}

// runRecipe runs a container of a recipe as kubelet would, with args, and returns its exit
// status and output. secrets is where the secret of the recipe is, if it has one.
func (s *site) runRecipe(t *testing.T, p podTemplate, c recipeContainer, secrets string, args ...string) (int32, string) {
	t.Helper()
	ctx := t.Context()
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: c.Name}, Image: &runtimeapi.ImageSpec{Image: s.registry.Addr + "/shoal:v1"},
		Command: c.Command, Args: args,
	}
	for _, m := range c.VolumeMounts {
		for _, v := range p.Spec.Volumes {
			switch {
			case v.Name != m.Name:
			case v.HostPath != nil && v.HostPath.Path == "/run/shoal": // where a node has its sockets
				config.Mounts = append(config.Mounts, &runtimeapi.Mount{ContainerPath: m.MountPath, HostPath: filepath.Dir(s.node.Control)})
			case v.Secret != nil:
				for _, i := range v.Secret.Items {
					noError(t, os.Rename(filepath.Join(secrets, i.Key), filepath.Join(secrets, i.Path)))
				}
				config.Mounts = append(config.Mounts, &runtimeapi.Mount{ContainerPath: m.MountPath, HostPath: secrets, Readonly: m.ReadOnly})
			}
		}
	}
	if len(config.Mounts) != len(c.VolumeMounts) {
		t.Fatalf("%d of %d mounts are known", len(config.Mounts), len(c.VolumeMounts))
	}
	pod := must(s.CRI.RunPod(ctx, filepath.Base(t.TempDir())+fmt.Sprint(time.Now().UnixNano()), lab.PodOptions{}))(t)
	x := must(pod.StartConfig(ctx, config))(t)
	status := must(x.Wait(ctx, time.Minute))(t)
	log := string(must(os.ReadFile(s.Path("log", config.LogPath)))(t))
	noError(t, pod.Remove(ctx))
	return status, log
}

// TestPrefetchRecipes: the Job and the DaemonSet of deploy/examples bring every byte of an
// image to the node, and the Job private ones with an imagePullSecret.
func TestPrefetchRecipes(t *testing.T) {
	s := newPullSite(t, asShipped)
	ctx := t.Context()
	program := must(os.ReadFile(filepath.Join(s.Bin, "shoal")))(t)
	executable := file("usr/local/bin/shoal", string(program))
	executable.Mode = 0o755
	s.push(t, "shoal", must(s.Guest())(t), lab.PlainLayer(makeTar(t, dir("usr/"), dir("usr/local/"), dir("usr/local/bin/"), dir("run/"), executable)))
	noError(t, s.CRI.Pull(ctx, s.registry.Addr+"/shoal:v1", nil))
	g := must(s.StartTenants(s.registry, map[string]string{"ann": "anns-word"}))(t)
	for i, name := range []string{"job", "daemonset", "ann/private"} {
		one, _ := noisy(t, "f", uint64(84+i), 24)
		s.push(t, name, one)
	}

	job, set := recipe(t, "prefetch-job.yaml", false), recipe(t, "prefetch-daemonset.yaml", false)
	for ref, p := range map[string]podTemplate{s.registry.Addr + "/job:v1": job, s.registry.Addr + "/daemonset:v1": set} {
		c := append(p.Spec.InitContainers, p.Spec.Containers...)[0]
		if status, log := s.runRecipe(t, p, c, "", ref); status != 0 {
			t.Errorf("%s: exit status %d:\n%s", ref, status, log)
		}
		s.isHere(t, ref)
	}

	private := g.Addr + "/ann/private:v1"
	if status, log := s.runRecipe(t, job, job.Spec.Containers[0], "", private); status == 0 || !strings.Contains(log, "denied") {
		t.Errorf("a private image without a credential: exit status %d:\n%s", status, log)
	}
	job = recipe(t, "prefetch-job.yaml", true)
	for password, right := range map[string]bool{"anns-word": true, "wrong": false} {
		secrets := t.TempDir() // as kubelet writes it: a file for each key
		auth := base64.StdEncoding.EncodeToString([]byte("ann:" + password))
		noError(t, os.WriteFile(filepath.Join(secrets, ".dockerconfigjson"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, g.Addr, auth), 0o600))
		status, log := s.runRecipe(t, job, job.Spec.Containers[0], secrets, "--docker-config=/run/secrets/pull", private)
		if (status == 0) != right {
			t.Errorf("with the password %q: exit status %d:\n%s", password, status, log)
		}
		if strings.Contains(log, password) || strings.Contains(log, auth) {
			t.Errorf("the output has the secret in it:\n%s", log)
		}
	}
	s.isHere(t, private)
	if b := string(must(os.ReadFile(s.node.Log))(t)); strings.Contains(b, "anns-word") {
		t.Error("the node's log has the secret in it")
	}
}
