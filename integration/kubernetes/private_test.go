//go:build kubernetes

package kubernetes

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/lab/cluster"
	"github.com/shoalfs/shoal/integration/report"
)

// secrets is what is in a pod's spec for it to show the namespace's secret.
var secrets = object{"imagePullSecrets": []object{{"name": "pull"}}}

// namespace makes a namespace, and in it a secret for a registry, if user is not empty.
func (s *site) namespace(t *testing.T, name, registry, user, password string) {
	t.Helper()
	ctx := t.Context()
	noError(t, s.Create(ctx, "/api/v1/namespaces", cluster.Object{"metadata": cluster.Object{"name": name}}))
	noError(t, lab.WaitFor(ctx, "the service account of "+name, 5*time.Minute, func() error {
		return s.Get(ctx, "/api/v1/namespaces/"+name+"/serviceaccounts/default", nil)
	}))
	if user == "" {
		return
	}
	config := must(json.Marshal(cluster.Object{"auths": cluster.Object{registry: cluster.Object{"username": user, "password": password}}}))(t)
	noError(t, s.Create(ctx, "/api/v1/namespaces/"+name+"/secrets", cluster.Object{
		"metadata": cluster.Object{"name": "pull"}, "type": "kubernetes.io/dockerconfigjson",
		"data": cluster.Object{".dockerconfigjson": base64.StdEncoding.EncodeToString(config)},
	}))
}

// TestImagePullSecrets: pods of two namespaces, each with a secret of its own, run their
// private images lazily. Users of pods with no secret or with the other namespace's read
// the message of the registry, word by word the one that they read with overlayfs, and
// with a wrong secret what the registry has said; also for an image that is on the node.
func TestImagePullSecrets(t *testing.T) {
	s := newSite(t)
	ctx := t.Context()
	addr := s.tenants.Addr
	for i, user := range []string{"ann", "bob"} {
		s.app(t, user+"/app", file{name: "data", data: content(i)})
		s.namespace(t, user, addr, user, user+"s-word")
	}
	s.namespace(t, "nobody", addr, "", "")
	s.namespace(t, "wrong", addr, "ann", "not-anns-word")
	for _, policy := range []string{"Always", "IfNotPresent"} {
		name := "private-" + strings.ToLower(policy)
		for _, user := range []string{"ann", "bob"} {
			ref := addr + "/" + user + "/app:v1"
			for _, node := range []string{"one", "plain-one"} {
				n := s.node(t, node)
				s.run(t, name+"-"+node, podSpec{namespace: user, node: on(n), container: guest(ref, policy), spec: secrets})
				if n.Shoal != nil {
					noError(t, lazy(ctx, n, ref))
				}
			}
		}
		ref := addr + "/ann/app:v1"
		for _, namespace := range []string{"nobody", "wrong", "bob"} {
			spec := secrets
			if namespace == "nobody" {
				spec = nil
			}
			said := map[string]string{}
			for _, node := range []string{"one", "plain-one"} {
				set := s.create(t, "refused-"+name+"-"+node, podSpec{
					namespace: namespace, node: on(s.node(t, node)), container: guest(ref, policy), spec: spec,
				})
				said[node] = set.refused(t, ref)
			}
			want := said["plain-one"]
			if namespace == "wrong" {
				// The token server refuses, and containerd shows what the mirror says of that.
				want = "registry " + addr + ": HTTP 401 Unauthorized"
			}
			if !strings.Contains(said["one"], want) {
				t.Errorf("%s, namespace %s: the user reads %q, want %q", policy, namespace, said["one"], want)
			}
			t.Logf("%s, namespace %s: %s", policy, namespace, said["one"])
		}
	}
}

// refused waits until the pod's image has been refused, and returns what its user reads
// after containerd's own words, which depend on the way of the pull.
func (p *pods) refused(t *testing.T, ref string) (message string) {
	t.Helper()
	ctx := t.Context()
	noError(t, lab.WaitFor(ctx, "a refusal", 5*time.Minute, func() error {
		st, err := p.s.Pod(ctx, p.namespace, p.first())
		if err != nil {
			return err
		}
		if st.Ready() == nil {
			t.Fatalf("pod %s/%s is ready", p.namespace, p.first())
		}
		events, err := p.s.Events(ctx, p.namespace, p.first())
		if err != nil {
			return err
		}
		for _, e := range events {
			for _, own := range []string{"failed to resolve image: ", "failed to resolve reference " + strconv.Quote(ref) + ": "} {
				if _, after, ok := strings.Cut(e, own); ok && strings.HasPrefix(e, "Failed: ") {
					message = after
					return nil
				}
			}
		}
		return st.Ready()
	}))
	return message
}

// TestMeasurePrivate: with a secret, a real image is ready as soon as it is
// from an open registry.
func TestMeasurePrivate(t *testing.T) {
	s := newSite(t)
	n := s.node(t, "one")
	s.namespace(t, "private", s.private.Addr, privateUser, privatePassword)
	s.warm(t, s.real.Addr+"/python-django:v1")
	var private, public []float64
	for i := range runs {
		s.forget(t, n)
		open, took := s.run(t, fmt.Sprint("public-", i), podSpec{node: on(n), container: server(s.real, "python-django", "v1")})
		public = append(public, took.Seconds())
		noError(t, open.remove(t))
		s.forget(t, n)
		image := server(s.private, "python-django", "v1")
		secret, took := s.run(t, fmt.Sprint("private-", i), podSpec{namespace: "private", node: on(n), container: image, spec: secrets})
		private = append(private, took.Seconds())
		noError(t, lazy(t.Context(), n, image["image"].(string)))
		noError(t, secret.remove(t))
	}
	const what = "private image with imagePullSecrets, lazy: pod apply to Ready"
	figure(t, what, "s", "", 0, private...)
	figure(t, what+", against public", "x", report.AtMost, 1.2, ratios(private, public)...)
}

// TestCredentialProvider: kubelet asks a plugin, as those of clouds are, for passwords
// that expire. Images are lazy with each of them, and a container goes on reading when
// that of its pull has expired.
func TestCredentialProvider(t *testing.T) {
	s := newSite(t)
	n := s.node(t, "one")
	for _, password := range []string{"first", "second"} {
		s.tenants.Rotate(cloud, password)
		noError(t, n.Write(passwordFile, password))
		data := content(len(password))
		s.app(t, cloud+"/"+password, file{name: "data", data: data})
		ref := s.tenants.Addr + "/" + cloud + "/" + password + ":v1"
		set, _ := s.run(t, "provided-"+password, podSpec{node: on(n), container: guest(ref, "Always")})
		noError(t, lazy(t.Context(), n, ref))
		s.tenants.Rotate(cloud, "another one")
		want := fmt.Sprintf("%x  /data\n", sha256.Sum256([]byte(data)))
		if got := must(set.exec(t, "/guest", "sum", "/data"))(t); got != want {
			t.Errorf("the container reads %q, want %q", got, want)
		}
	}
}
