//go:build kubernetes

package watch

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
)

// TestServer runs the suite on a real API server, with the rights in Rules and no others.
// It needs what integration/kubernetes/setup.sh builds, in SHOAL_BIN/kubernetes.
func TestServer(t *testing.T) {
	s := startServer(t)
	s.grant(t, "program", Rules())
	s.grant(t, "forget", ForgetRules())
	var writes atomic.Int64
	count := func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			if r.Method == http.MethodPatch && strings.Contains(r.URL.Path, "/nodes/") {
				writes.Add(1)
			}
			return next.RoundTrip(r)
		})
	}
	suite(t, api{admin: s.client(t, "admin", nil), program: s.client(t, "program", count), forget: s.client(t, "forget", nil), writes: writes.Load})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// server is an API server on loopback. The token of a user is the user's name.
type server struct{ url string }

func startServer(t *testing.T) *server {
	t.Helper()
	bin := os.Getenv("SHOAL_BIN")
	if bin == "" {
		bin = "../../../../bin"
	}
	dir := t.TempDir()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	sa := file("sa.key", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	tokens := file("tokens.csv", []byte("admin,admin,admin,system:masters\nprogram,program,program\nforget,forget,forget\n"))
	etcd, peer, port := fmt.Sprintf("http://127.0.0.1:%d", freePort(t)), fmt.Sprintf("http://127.0.0.1:%d", freePort(t)), fmt.Sprint(freePort(t))
	var down atomic.Value // the name of a program that has ended
	start := func(program string, args ...string) {
		t.Helper()
		log, err := os.Create(filepath.Join(dir, program+".log"))
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(bin, "kubernetes", program), args...)
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Start(); err != nil {
			t.Fatalf("%v: run integration/kubernetes/setup.sh", err)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = cmd.Wait() // it was killed, or its log says why
			down.Store(program)
		}()
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			<-ended
			log.Close()
			if t.Failed() {
				b, _ := os.ReadFile(log.Name())
				t.Logf("%s ends:\n%s", program, b[max(0, len(b)-2000):])
			}
		})
	}
	start("etcd", "--data-dir", filepath.Join(dir, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", etcd, "--advertise-client-urls", etcd, "--listen-peer-urls", peer)
	start("kube-apiserver", "--etcd-servers", etcd, "--cert-dir", dir, "--bind-address", "127.0.0.1", "--secure-port", port,
		// Not on loopback, says it; no program uses it.
		"--advertise-address", "192.0.2.1", "--service-cluster-ip-range", "10.96.0.0/16",
		"--token-auth-file", tokens, "--authorization-mode", "RBAC", "--disable-admission-plugins", "ServiceAccount",
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", sa, "--service-account-signing-key-file", sa)
	s := &server{url: "https://127.0.0.1:" + port}
	admin := s.client(t, "admin", nil)
	end := time.Now().Add(5 * time.Minute)
	for {
		_, err := admin.Namespaces().Get(t.Context(), "default", metav1.GetOptions{})
		if err == nil {
			return s
		}
		if time.Now().After(end) || down.Load() != nil {
			t.Fatalf("the API server does not answer (ended: %v): %v", down.Load(), err)
		}
		time.Sleep(100 * time.Millisecond) // the pace of a poll with an end
	}
}

func (s *server) config(user string) *rest.Config {
	return &rest.Config{Host: s.url, BearerToken: user, QPS: -1, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
}

func (s *server) client(t *testing.T, user string, wrap func(http.RoundTripper) http.RoundTripper) typedcorev1.CoreV1Interface {
	t.Helper()
	cfg := s.config(user)
	if wrap != nil {
		cfg.Wrap(wrap)
	}
	c, err := typedcorev1.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// grant gives a user rights.
func (s *server) grant(t *testing.T, user string, rules []Rule) {
	t.Helper()
	cfg := s.config("admin")
	cfg.APIPath, cfg.GroupVersion, cfg.NegotiatedSerializer = "/apis", &rbacv1.SchemeGroupVersion, scheme.Codecs.WithoutConversion()
	c, err := rest.RESTClientFor(cfg)
	if err != nil {
		t.Fatal(err)
	}
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: user}}
	for _, r := range rules {
		role.Rules = append(role.Rules, r.PolicyRule)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: user},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: user},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}},
	}
	for resource, o := range map[string]runtime.Object{"clusterroles": role, "clusterrolebindings": binding} {
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Post().Resource(resource).SetHeader("Content-Type", "application/json").Body(b).Do(context.Background()).Error(); err != nil {
			t.Fatalf("%s: %v", resource, err)
		}
	}
}
