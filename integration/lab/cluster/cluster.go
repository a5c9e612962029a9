// Package cluster runs a real Kubernetes in the lab: a control plane in one box, with
// a registry and a supernode beside it, and nodes in boxes of their own, each with
// containerd, kubelet, kube-proxy and a CNI network, on shoal or on overlayfs.
//
//	c, _ := cluster.New(ctx, l)
//	n, _ := c.AddNode(ctx, "one", cluster.NodeOptions{Shoal: true})
//	_ = c.Create(ctx, "/api/v1/namespaces/default/pods", pod)
//
// Nothing in it is made easier for shoal: a node has the config files of
// docs/install.md, `shoal install containerd` has edited containerd's config, and all
// paths, ports and sockets are the default ones.
//
// Needs root, and what `make setup` and integration/kubernetes/setup.sh build.
package cluster

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
	"path/filepath"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// Cluster is a control plane and what it needs. Its lab's Close ends it.
type Cluster struct {
	*lab.Lab
	// Control is the machine of the control plane, the registries and the supernode.
	Control *lab.Box
	// Registry is an open registry, with nothing in it but the pause image.
	Registry  *lab.Registry
	Supernode *lab.Supernode
	Nodes     []*Node
	// Kubeconfig is the file that clients use; each of them is an administrator.
	Kubeconfig string

	net    *lab.Net
	pause  string
	token  string
	client *http.Client
	plain  []string // host:port of registries that speak plain HTTP
}

// diskSize of a machine; it is a file with holes.
const diskSize = 16 << 30

// registryRate is that of the link of the machine with registry and supernode.
const registryRate = lab.Gigabit

// programs is the directory with what integration/kubernetes/setup.sh has built.
func programs(l *lab.Lab, elem ...string) string {
	return filepath.Join(append([]string{l.Bin, "kubernetes"}, elem...)...)
}

// New starts a registry, a supernode and a control plane.
func New(ctx context.Context, l *lab.Lab) (*Cluster, error) {
	if _, err := os.Stat(programs(l, "kubelet")); err != nil {
		return nil, fmt.Errorf("%w: run integration/kubernetes/setup.sh %s", err, l.Bin)
	}
	c := &Cluster{Lab: l, Kubeconfig: l.Path("kubeconfig"), token: rand.Text()}
	l.OnClose(l.RemoveCgroup)
	var err error
	if c.net, err = l.NewNet(ctx, 1); err != nil {
		return nil, err
	}
	if c.Control, err = c.newBox(ctx, "control", registryRate); err != nil {
		return nil, err
	}
	at := c.Control.Lab
	if c.Registry, err = at.StartRegistry(ctx, "registry", l.Path("images"), ""); err != nil {
		return nil, err
	}
	if err := c.AddRegistry(c.Registry.Addr); err != nil {
		return nil, err
	}
	if c.pause, err = c.Registry.PushPause(ctx); err != nil {
		return nil, err
	}
	if c.Supernode, err = at.StartDefaultSupernode(ctx, "supernode", nil); err != nil {
		return nil, err
	}
	return c, c.startControlPlane(ctx)
}

// newBox makes a machine with a default route, which kubelet and others look for.
func (c *Cluster) newBox(ctx context.Context, name string, rate lab.Rate) (*lab.Box, error) {
	h, err := c.net.NewHost(ctx, name, 0, rate)
	if err != nil {
		return nil, err
	}
	b, err := c.NewBox(ctx, h, diskSize)
	if err != nil {
		return nil, err
	}
	return b, h.Run(ctx, "ip", "route", "add", "default", "dev", "eth0")
}

// AddRegistry tells the supernode, and the nodes that are added from now on, that the
// registry at this address speaks plain HTTP.
func (c *Cluster) AddRegistry(addr string) error {
	c.plain = append(c.plain, addr)
	return writeHosts(c.Control, addr, "")
}

// writeHosts writes the hosts.toml of a registry.
func writeHosts(b *lab.Box, addr, mirror string) error {
	return b.Write("/etc/containerd/certs.d/"+addr+"/hosts.toml", fmt.Sprintf("server = %q\n%s", "http://"+addr, mirror))
}

// startControlPlane starts etcd, API server, controller manager and scheduler, and waits
// until pods can be made.
func (c *Cluster) startControlPlane(ctx context.Context) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	files := map[string]string{
		"sa.key":     string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})),
		"tokens.csv": c.token + ",admin,admin,system:masters\n",
	}
	dir := c.Path("pki")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	at, ip := c.Control.Lab, c.Control.IP
	const etcd = "http://127.0.0.1:2379"
	// It need not outlive a power cut.
	if _, err := at.Start("etcd", programs(c.Lab, "etcd"), nil, "--data-dir", c.Path("etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", etcd, "--advertise-client-urls", etcd, "--listen-peer-urls", "http://127.0.0.1:2380"); err != nil {
		return err
	}
	sa, cert := filepath.Join(dir, "sa.key"), filepath.Join(dir, "apiserver.crt")
	api, err := at.Start("apiserver", programs(c.Lab, "kube-apiserver"), nil, "--etcd-servers", etcd,
		"--cert-dir", dir, "--advertise-address", ip, "--service-cluster-ip-range", "10.96.0.0/16",
		"--token-auth-file", filepath.Join(dir, "tokens.csv"), "--authorization-mode", "Node,RBAC",
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", sa, "--service-account-signing-key-file", sa,
		"--kubelet-preferred-address-types", "InternalIP", "--allow-privileged")
	if err != nil {
		return err
	}
	if err := lab.WaitFor(ctx, "API server", 5*time.Minute, func() error {
		if err := api.Alive(); err != nil {
			return err
		}
		if err := c.trust(cert); err != nil {
			return err
		}
		return c.Get(ctx, "/readyz", nil)
	}); err != nil {
		return err
	}
	if err := c.writeKubeconfig(cert); err != nil {
		return err
	}
	for name, args := range map[string][]string{
		"kube-controller-manager": {"--service-account-private-key-file", sa, "--root-ca-file", cert},
		"kube-scheduler":          nil,
	} {
		if _, err := at.Start(name, programs(c.Lab, name), nil, append(args, "--kubeconfig", c.Kubeconfig, "--leader-elect=false")...); err != nil {
			return err
		}
	}
	return lab.WaitFor(ctx, "the default service account", 3*time.Minute, func() error {
		return c.Get(ctx, "/api/v1/namespaces/default/serviceaccounts/default", nil)
	})
}

// writeKubeconfig writes Kubeconfig.
func (c *Cluster) writeKubeconfig(cert string) error {
	ca, err := os.ReadFile(cert)
	if err != nil {
		return err
	}
	type object = map[string]any
	b, err := json.Marshal(object{
		"apiVersion": "v1", "kind": "Config", "current-context": "lab",
		"clusters": []object{{"name": "lab", "cluster": object{"server": c.url(""), "certificate-authority-data": ca}}},
		"users":    []object{{"name": "admin", "user": object{"token": c.token}}},
		"contexts": []object{{"name": "lab", "context": object{"cluster": "lab", "user": "admin"}}},
	})
	if err != nil {
		return err
	}
	return os.WriteFile(c.Kubeconfig, b, 0o600)
}
