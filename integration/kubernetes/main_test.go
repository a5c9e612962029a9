//go:build kubernetes

package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/lab/cluster"
	"github.com/shoalfs/shoal/integration/report"
)

// The tests share a cluster: it takes longer to start than most of them. What goes
// wrong with figures is a row of the report; what goes wrong otherwise fails the test.

var (
	shared *site
	rows   report.Report
)

func TestMain(m *testing.M) {
	code := m.Run()
	if shared != nil {
		if code != 0 {
			logs, _ := filepath.Glob(shared.Path("log", "*.log"))
			for _, f := range logs {
				fmt.Printf("%s ends:\n%s\n", filepath.Base(f), lab.Tail(f, 10))
			}
		}
		if err := shared.Close(); err != nil {
			fmt.Println("close the lab:", err)
			code = 1
		}
	}
	if err := rows.Print(os.Stdout); err != nil {
		println(err.Error())
		code = 1
	}
	os.Exit(code)
}

// figure adds a row, and saves all rows if SHOAL_K8S_OUT names a directory.
func figure(t *testing.T, name, unit string, cmp report.Cmp, bar float64, samples ...float64) {
	t.Helper()
	rows.Add(name, unit, cmp, bar, samples...)
	dir := os.Getenv("SHOAL_K8S_OUT")
	if dir == "" {
		return
	}
	all := report.Report{Rows: append([]report.Row(nil), rows.Rows...)}
	noError(t, all.Keep(dir, "k8s"))
	noError(t, all.Save(dir, "k8s"))
}

// runs is how often what takes long is measured.
const runs = 2

// site is a cluster, and images.
type site struct {
	*cluster.Cluster
	// real has the images of bench/images, and private the same ones for those with a
	// password; tenants has those of Cluster.Registry, each user's for itself.
	real, private *lab.Registry
	tenants       *lab.Tenants

	nodes map[string]*cluster.Node
	// began is when the cluster was started; zero as soon as a lazy pod has been ready.
	began time.Time
}

const (
	privateUser, privatePassword = "puller", "secret"
	// cloud is the user whose password a credential provider of kubelet's knows.
	cloud        = "cloud"
	passwordFile = "/etc/kubernetes/cloud-password"
)

// newSite returns the cluster, which the first test that wants it starts.
func newSite(t *testing.T) *site {
	t.Helper()
	if shared != nil {
		if shared.nodes == nil {
			t.Fatal("the cluster did not start")
		}
		return shared
	}
	if os.Geteuid() != 0 {
		t.Skip("mounts file systems and runs containers: run as root")
	}
	ctx := t.Context()
	build := exec.CommandContext(ctx, "../../bench/images/build.sh", "python-django", "node-express", "redis")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the images: %v\n%s", err, out)
	}
	bin := os.Getenv("SHOAL_BIN")
	if bin == "" {
		bin = "../../bin"
	}
	began := time.Now()
	l := must(lab.New(bin))(t)
	shared = &site{Cluster: &cluster.Cluster{Lab: l}}
	c := must(cluster.New(ctx, l))(t)
	s := &site{Cluster: c, began: began}
	images := filepath.Join(must(lab.ImagesDir())(t), "registry")
	at := c.Control.Lab
	s.real = must(at.StartRegistry(ctx, "registry-real", images, ""))(t)
	hashed := must(l.Run(ctx, "htpasswd", "-Bbn", privateUser, privatePassword))(t)
	noError(t, os.WriteFile(l.Path("htpasswd"), []byte(hashed), 0o600))
	s.private = must(at.StartRegistry(ctx, "registry-private", images, l.Path("htpasswd")))(t)
	s.tenants = must(l.StartTenants(c.Registry, map[string]string{"ann": "anns-word", "bob": "bobs-word", cloud: "first"}))(t)
	for _, addr := range []string{s.real.Addr, s.private.Addr, s.tenants.Addr} {
		noError(t, c.AddRegistry(addr))
	}
	s.nodes = map[string]*cluster.Node{}
	shared = s
	return s
}

// node returns the node of this name, which the first test that wants it starts. Names
// of those on overlayfs begin with "plain"; the one that is called "slow" prefetches slowly.
func (s *site) node(t *testing.T, name string) *cluster.Node {
	t.Helper()
	if n := s.nodes[name]; n != nil {
		return n
	}
	var config map[string]string
	if name == "slow" {
		config = map[string]string{"prefetch_rate": `"1MiB"`}
	}
	n := must(s.AddNode(t.Context(), name, cluster.NodeOptions{
		Shoal:       !strings.HasPrefix(name, "plain"),
		Config:      config,
		Prepare:     s.provideCredentials,
		KubeletArgs: []string{"--image-credential-provider-config", "/etc/kubernetes/credentials.json", "--image-credential-provider-bin-dir", "/opt/credentials"},
	}))(t)
	s.nodes[name] = n
	// So that the first pod of a test is no other than the next one.
	s.app(t, "hello", file{name: "data", data: "hello"})
	ref := s.Registry.Addr + "/hello:v1"
	set, _ := s.run(t, "hello-"+name, podSpec{node: on(n), container: guest(ref, "IfNotPresent")})
	if n.Shoal != nil {
		noError(t, lazy(t.Context(), n, ref))
		if !s.began.IsZero() {
			figure(t, "from programs in the cache to a lazy pod that is Ready", "s", report.AtMost, 30, time.Since(s.began).Seconds())
			s.began = time.Time{}
		}
	}
	noError(t, set.remove(t))
	return n
}

// provideCredentials gives kubelet a credential provider, as those of clouds are, for
// images of the user cloud.
func (s *site) provideCredentials(n *cluster.Node) error {
	config, err := json.Marshal(cluster.Object{
		"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig",
		"providers": []cluster.Object{{
			"name": "lab", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
			"matchImages": []string{s.tenants.Addr + "/" + cloud}, "defaultCacheDuration": "0s",
		}},
	})
	if err != nil {
		return err
	}
	plugin := fmt.Sprintf(`#!/bin/sh
cat >/dev/null
printf '{"apiVersion": "credentialprovider.kubelet.k8s.io/v1", "kind": "CredentialProviderResponse", "cacheKeyType": "Image", "cacheDuration": "0s",
	"auth": {"%s": {"username": "%s", "password": "%%s"}}}' "$(cat %s)"
`, s.tenants.Addr, cloud, passwordFile)
	return errors.Join(
		n.Write("/etc/kubernetes/credentials.json", string(config)), n.Write(passwordFile, "first"),
		n.Write("/opt/credentials/lab", plugin), os.Chmod(n.Path("/opt/credentials/lab"), 0o755)) //nolint:gosec // a program
}

// warm has the supernode fetch an image, and waits until it has compressed the chunks,
// which takes processor time from the pods that share this machine with it.
func (s *site) warm(t *testing.T, ref string) {
	t.Helper()
	must(s.Control.Lab.Run(t.Context(), "shoal", "prefetch", "--control", s.Supernode.Control, ref))(t)
	noError(t, s.Supernode.Settle(t.Context(), 5*time.Minute))
}

// app pushes an image with a program that waits, and these files.
func (s *site) app(t *testing.T, repository string, files ...file) {
	t.Helper()
	layer := must(lab.GzipLayer(makeTar(t, files...)))(t)
	must(s.Registry.Push(t.Context(), repository, "v1", []string{"/guest", "pause"}, must(s.Guest())(t), layer))(t)
}

// must fails the test on an error: must(f())(t).
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// lazy says whether a shoal node has ref as a lazy image.
func lazy(ctx context.Context, n *cluster.Node, ref string) error {
	st, err := n.Shoal.Status(ctx)
	if err != nil {
		return err
	}
	for _, im := range st.Images {
		if im.Ref == ref {
			return nil
		}
	}
	return fmt.Errorf("%s is not lazy on node %s; its log ends:\n%s", ref, n.Name, lab.Tail(n.Shoal.Log, 5))
}
