//go:build kubernetes

package kubernetes

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/lab/cluster"
)

type object = cluster.Object

// contextOf is the test's context, and in its cleanup, when that has ended, another one.
func contextOf(t *testing.T) context.Context {
	if t.Context().Err() != nil {
		return context.Background()
	}
	return t.Context()
}

// pods are n pods of one kind, all with the label run=NAME.
type pods struct {
	namespace, name string
	n               int
	s               *site
}

// podSpec is what tests decide of a pod.
type podSpec struct {
	namespace string // empty: default
	n         int    // how many; 0: 1
	node      map[string]string
	container object
	spec      object // further fields
}

// on is the selector of one node.
func on(n *cluster.Node) map[string]string {
	return map[string]string{"kubernetes.io/hostname": n.Name}
}

// create makes pods, and removes them with the test's end.
func (s *site) create(t *testing.T, name string, p podSpec) *pods {
	t.Helper()
	set := &pods{namespace: p.namespace, name: name, n: max(1, p.n), s: s}
	if set.namespace == "" {
		set.namespace = "default"
	}
	container := object{"name": "main"}
	for k, v := range p.container {
		container[k] = v
	}
	spec := object{
		"nodeSelector": p.node, "containers": []object{container}, "terminationGracePeriodSeconds": 1,
		"automountServiceAccountToken": false, "enableServiceLinks": false,
	}
	for k, v := range p.spec {
		spec[k] = v
	}
	t.Cleanup(func() {
		if err := set.remove(t); err != nil {
			t.Errorf("remove pods %s: %v", name, err)
		}
	})
	for i := range set.n {
		noError(t, s.Create(t.Context(), "/api/v1/namespaces/"+set.namespace+"/pods", object{
			"metadata": object{"name": fmt.Sprintf("%s-%d", name, i), "labels": object{"run": name}}, "spec": spec,
		}))
	}
	return set
}

// run makes pods and waits until they are ready; it returns how long both took.
func (s *site) run(t *testing.T, name string, p podSpec) (*pods, time.Duration) {
	t.Helper()
	began := time.Now()
	set := s.create(t, name, p)
	set.ready(t)
	return set, time.Since(began)
}

// selector is the query for all pods of the set.
func (p *pods) selector() string { return "?labelSelector=run%3D" + p.name }

func (p *pods) path() string { return "/api/v1/namespaces/" + p.namespace + "/pods" }

// first is the name of the first pod.
func (p *pods) first() string { return p.name + "-0" }

// ready waits until all are ready.
func (p *pods) ready(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	noError(t, lab.WaitFor(ctx, "pods "+p.name, 10*time.Minute, func() error {
		if p.n > 1 {
			wait(ctx, 500*time.Millisecond) // lists cost the API server much
		}
		list, err := p.list(t)
		if err != nil {
			return err
		}
		if len(list) < p.n {
			return fmt.Errorf("%d of %d", len(list), p.n)
		}
		for _, st := range list {
			if err := st.Ready(); err != nil {
				return err
			}
		}
		return nil
	}))
}

func (p *pods) list(t *testing.T) ([]cluster.PodStatus, error) {
	var list struct {
		Items []struct{ Status cluster.PodStatus }
	}
	// Also in a cleanup, when the test's context has ended.
	err := p.s.Get(contextOf(t), p.path()+p.selector()+"&resourceVersion=0", &list)
	var all []cluster.PodStatus
	for _, i := range list.Items {
		all = append(all, i.Status)
	}
	return all, err
}

// remove deletes the pods and waits until they are gone. It may be called more than once.
func (p *pods) remove(t *testing.T) error {
	ctx := contextOf(t)
	if err := p.s.Delete(ctx, p.path()+p.selector()); err != nil {
		return err
	}
	return lab.WaitFor(ctx, "removal of pods "+p.name, 5*time.Minute, func() error {
		list, err := p.list(t)
		if err == nil && len(list) > 0 {
			err = fmt.Errorf("%d are left", len(list))
		}
		return err
	})
}

// exec runs a command in the first pod.
func (p *pods) exec(t *testing.T, command ...string) (string, error) {
	return p.s.Kubectl(contextOf(t), append([]string{"--namespace", p.namespace, "exec", p.first(), "--"}, command...)...)
}

// clear waits until a node has no pods, and removes those that have ended: their containers
// still use their images, and kubelet would remove them within a minute.
func (s *site) clear(t *testing.T, n *cluster.Node) {
	t.Helper()
	ctx := t.Context()
	noError(t, lab.WaitFor(ctx, "no pods on node "+n.Name, 5*time.Minute, func() error {
		list, err := n.CRI.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		var errs []error
		for _, p := range list.Items {
			err := fmt.Errorf("pod %s is there", p.Metadata.Name)
			if p.State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
				_, err = n.CRI.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id})
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}))
}

// forget removes all images of a node but that of sandboxes, so that the next pull is a
// cold one.
func (s *site) forget(t *testing.T, n *cluster.Node) {
	t.Helper()
	ctx := t.Context()
	s.clear(t, n)
	for _, ref := range must(n.CRI.Images(ctx))(t) {
		if !strings.Contains(ref, "/pause:") {
			noError(t, n.CRI.RemoveImage(ctx, ref))
		}
	}
}

// guest is a container of one of our own images.
func guest(ref, policy string) object {
	return object{"image": ref, "imagePullPolicy": policy}
}

// file is one of an image's layer.
type file struct {
	name, data string
	uid, gid   int
	mode       int64 // 0: 0644
}

func makeTar(t *testing.T, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: cmp.Or(f.mode, 0o644), Size: int64(len(f.data)), Uid: f.uid, Gid: f.gid, ModTime: time.Unix(1_700_000_000, 0)}
		noError(t, w.WriteHeader(h))
		must(w.Write([]byte(f.data)))(t)
	}
	noError(t, w.Close())
	return b.Bytes()
}

// content is some megabytes that are different for each seed.
func content(seed int) string {
	var b strings.Builder
	for i := 0; b.Len() < 4<<20; i++ {
		fmt.Fprintf(&b, "%d:%d\n", seed*7919+i, i*i)
	}
	return b.String()
}

// serveOn has the image's program, which serves itself alone and then ends, serve all.
const serveOn = `
process.exit = () => {}
const s = require('net').Server.prototype, listen = s.listen
s.listen = function (port, host, up) { return listen.call(this, port, '0.0.0.0', up) }
require('/app/server.js')`

// server is a container that is ready when it answers: what is on the real images, in
// the way that a Deployment would run it.
func server(registry *lab.Registry, image, tag string) object {
	probes := map[string]object{
		"python-django": {"httpGet": object{"path": "/", "port": 8000, "httpHeaders": []object{{"name": "Host", "value": "127.0.0.1"}}}},
		"node-express":  {"tcpSocket": object{"port": 3000}},
		"redis":         {"tcpSocket": object{"port": 6379}},
	}
	commands := map[string]string{
		"python-django": "cd /app && exec python3 manage.py runserver --noreload 0.0.0.0:8000",
		"node-express":  `cd /app && exec node -e "` + serveOn + `"`,
		"redis":         "cd /tmp && exec redis-server /app/redis.conf --bind 0.0.0.0 --protected-mode no",
	}
	probe := object{"periodSeconds": 1, "timeoutSeconds": 5}
	for k, v := range probes[image] {
		probe[k] = v
	}
	return object{"image": registry.Addr + "/" + image + ":" + tag, "command": []string{"sh", "-c", commands[image]}, "readinessProbe": probe}
}
