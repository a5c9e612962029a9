package cluster

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/shoalfs/shoal/integration/lab"
)

// NodeOptions say what a node is like.
type NodeOptions struct {
	// Shoal installs shoal on the node, for all of its images. A node without it does not
	// know shoal at all.
	Shoal bool
	// Config are keys of the shoal node's config that are not the default, as TOML.
	Config map[string]string
	// Prepare, if not nil, is called before anything starts on the node.
	Prepare func(*Node) error
	// KubeletArgs are further arguments of kubelet.
	KubeletArgs []string
}

// Node is a machine with a kubelet.
type Node struct {
	*lab.Box
	// Containerd, Kubelet and Proxy (kube-proxy) are the programs that run on it.
	Containerd, Kubelet, Proxy *Service
	// CRI is for what kubelet says to containerd.
	CRI *lab.CRI
	// Shoal is its node, under `shoal keep`; nil: it has overlayfs.
	Shoal *lab.Node

	c     *Cluster
	index int // from 1
}

// Service is a program that can be killed and started again.
type Service struct {
	*lab.Process

	start func() (*lab.Process, error)
}

// Restart starts it again, after Stop or Kill.
func (s *Service) Restart() (err error) {
	s.Process, err = s.start()
	return err
}

func startService(start func() (*lab.Process, error)) (*Service, error) {
	s := &Service{start: start}
	return s, s.Restart()
}

//go:embed containerd.toml
var containerdConfig string

// kubeletInit starts kubelet in mounts of its own, which other programs' mounts come
// to, and its own go to theirs: kubelet sets sysctls, and they are this machine's. Pods
// with a user namespace need a /proc with nothing mounted over it, so only kubelet has
// files of its own there.
const kubeletInit = `set -e
mount --make-private /proc
dir=/run/kubelet-sysctls; mkdir -p $dir
for s in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
	f=$dir/$(basename ${s%=*}); echo ${s#*=} > $f; mount --bind $f /proc/sys/${s%=*}
done
exec "$0" "$@"`

// AddNode starts a node, and waits until it is ready.
func (c *Cluster) AddNode(ctx context.Context, name string, o NodeOptions) (*Node, error) {
	n := &Node{c: c, index: len(c.Nodes) + 1}
	var err error
	if n.Box, err = c.newBox(ctx, name, lab.Gigabit); err != nil {
		return nil, err
	}
	c.Nodes = append(c.Nodes, n)
	if err := n.join(ctx); err != nil {
		return nil, err
	}
	if err := n.configure(); err != nil {
		return nil, err
	}
	if o.Prepare != nil {
		if err := o.Prepare(n); err != nil {
			return nil, err
		}
	}
	if o.Shoal {
		if err := n.installShoal(ctx, o.Config); err != nil {
			return nil, err
		}
	}
	n.Containerd, err = startService(func() (*lab.Process, error) {
		return n.Lab.Start(name+"-containerd", "containerd", nil)
	})
	if err != nil {
		return nil, err
	}
	if n.CRI, err = n.Box.CRI(n.Containerd.Log); err != nil {
		return nil, err
	}
	if err := n.WaitContainerd(ctx); err != nil {
		return nil, err
	}
	if err := n.startKubelet(o); err != nil {
		return nil, err
	}
	if err := n.startProxy(); err != nil {
		return nil, err
	}
	return n, n.WaitReady(ctx)
}

// podCIDR is what the addresses of all pods are in.
const podCIDR = "10.244.0.0/16"

// subnet is that of the node's pods.
func (n *Node) subnet() string { return fmt.Sprintf("10.244.%d.0/24", n.index) }

// join makes routes between the pods of all nodes.
func (n *Node) join(ctx context.Context) error {
	if err := n.c.Control.Run(ctx, "ip", "route", "add", n.subnet(), "via", n.IP); err != nil {
		return err
	}
	for _, other := range n.c.Nodes[:n.index-1] {
		if err := other.Run(ctx, "ip", "route", "add", n.subnet(), "via", n.IP); err != nil {
			return err
		}
		if err := n.Run(ctx, "ip", "route", "add", other.subnet(), "via", other.IP); err != nil {
			return err
		}
	}
	return nil
}

// configure writes the files of a node that does not know shoal.
func (n *Node) configure() error {
	for _, addr := range n.c.plain {
		if err := writeHosts(n.Box, addr, ""); err != nil {
			return err
		}
	}
	config := strings.NewReplacer("PAUSE", n.c.pause, "CNI", programs(n.Lab, "cni"), "RUNC", programs(n.Lab, "runc")).Replace(containerdConfig)
	if err := n.Write("/etc/containerd/config.toml", config); err != nil {
		return err
	}
	return n.Write("/etc/cni/net.d/10-lab.conflist", fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "lab", "plugins": [{
	"type": "bridge", "bridge": "cni0", "isGateway": true,
	"ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}
}]}`, n.subnet()))
}

// installShoal does what docs/install.md says.
func (n *Node) installShoal(ctx context.Context, set map[string]string) error {
	text, err := n.Lab.Run(ctx, "shoal", "config", "default", "node")
	if err != nil {
		return err
	}
	keys := map[string]string{"supernodes": fmt.Sprintf("[%q]", n.c.Supernode.Address)}
	for key, value := range set {
		keys[key] = value
	}
	for key, value := range keys {
		line := regexp.MustCompile(`(?m)^` + key + ` *=.*$`)
		if !line.MatchString(text) {
			return fmt.Errorf("the default config of a node has no %s", key)
		}
		text = line.ReplaceAllLiteralString(text, key+" = "+value)
	}
	token, err := os.ReadFile(n.c.TokenFile())
	if err != nil {
		return err
	}
	for path, content := range map[string]string{"/etc/shoal/node.toml": text, "/etc/shoal/token": string(token)} {
		if err := n.Write(path, content); err != nil {
			return err
		}
	}
	if n.Shoal, err = n.StartKeptNode(ctx); err != nil {
		return err
	}
	if _, err := n.Lab.Run(ctx, "shoal", "install", "containerd"); err != nil {
		return err
	}
	return n.AddMirror()
}

// AddMirror does what `shoal install containerd` leaves to the owner of the hosts.toml
// files of single registries.
func (n *Node) AddMirror() error {
	for _, addr := range n.c.plain {
		if err := writeHosts(n.Box, addr, mirror); err != nil {
			return err
		}
	}
	return nil
}

// mirror is the section that docs/containerd.md has for hosts.toml.
const mirror = `[host."https://127.0.0.1:7704"]
  ca = "/var/lib/shoal/mirror-ca.pem"
  capabilities = ["pull", "resolve"]
`

// WaitContainerd waits until containerd answers kubelet, which ends if it does not.
func (n *Node) WaitContainerd(ctx context.Context) error {
	return lab.WaitFor(ctx, "containerd of "+n.Name, 3*time.Minute, func() error {
		if err := n.Containerd.Alive(); err != nil {
			return err
		}
		_, err := n.CRI.Runtime.Version(ctx, &runtimeapi.VersionRequest{})
		return err
	})
}

// Ctr runs ctr on the node, with what kubelet's images and containers are in.
func (n *Node) Ctr(ctx context.Context, args ...string) (string, error) {
	return n.Lab.Run(ctx, "ctr", append([]string{"--namespace", "k8s.io"}, args...)...)
}

// Import adds the images of a tar, an OCI layout or docker's, to those that kubelet sees.
func (n *Node) Import(ctx context.Context, tar string) error {
	_, err := n.Ctr(ctx, "images", "import", tar)
	return err
}

// Shell runs a command line on the node and returns its standard output.
func (n *Node) Shell(ctx context.Context, line string) (string, error) {
	return n.Lab.Run(ctx, "sh", "-c", line)
}

func (n *Node) startKubelet(o NodeOptions) error {
	cgroup, err := n.Lab.NewCgroup(n.Name)
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: %s
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDNS: [10.96.0.10]
resolvConf: ""
serializeImagePulls: false
`, cgroup)
	if err := n.Write("/etc/kubernetes/kubelet.yaml", config); err != nil {
		return err
	}
	args := []string{
		"--mount", "--propagation", "unchanged", "sh", "-c", kubeletInit, programs(n.Lab, "kubelet"),
		"--config", "/etc/kubernetes/kubelet.yaml", "--kubeconfig", n.c.Kubeconfig,
		"--hostname-override", n.Name, "--node-ip", n.IP, "--node-labels", "snapshotter=" + n.snapshotter(),
	}
	n.Kubelet, err = startService(func() (*lab.Process, error) {
		return n.Lab.Start(n.Name+"-kubelet", "unshare", nil, append(args, o.KubeletArgs...)...)
	})
	return err
}

// startProxy starts what makes the addresses of Services work. The limits of connection
// tracking are this machine's, and it leaves them alone.
func (n *Node) startProxy() (err error) {
	n.Proxy, err = startService(func() (*lab.Process, error) {
		return n.Lab.Start(n.Name+"-proxy", programs(n.Lab, "kube-proxy"), nil, "--kubeconfig", n.c.Kubeconfig,
			"--hostname-override", n.Name, "--proxy-mode", "iptables", "--cluster-cidr", podCIDR, "--conntrack-max-per-core", "0",
			"--conntrack-tcp-timeout-established", "0", "--conntrack-tcp-timeout-close-wait", "0")
	})
	return err
}

// snapshotter is the one that its images are on, and the value of its label.
func (n *Node) snapshotter() string {
	if n.Shoal != nil {
		return "shoal"
	}
	return "overlayfs"
}

// WaitReady waits until the cluster has the node as ready.
func (n *Node) WaitReady(ctx context.Context) error {
	return lab.WaitFor(ctx, "node "+n.Name, 5*time.Minute, func() error {
		if err := n.Kubelet.Alive(); err != nil {
			return err
		}
		var node struct{ Status PodStatus }
		if err := n.c.Get(ctx, "/api/v1/nodes/"+n.Name, &node); err != nil {
			return err
		}
		if !node.Status.is("Ready") {
			return fmt.Errorf("it is not ready: %+v", node.Status.Conditions)
		}
		return nil
	})
}

// Usage returns what a directory of the node takes on its disk, in bytes, as du says.
func (n *Node) Usage(ctx context.Context, dir string) (bytes int64, err error) {
	out, err := n.Lab.Run(ctx, "du", "--summarize", "--block-size=1", "--one-file-system", dir)
	if err != nil {
		return 0, err
	}
	_, err = fmt.Sscan(out, &bytes)
	return bytes, err
}

// Logs are the files with what the node's programs have said.
func (n *Node) Logs() ([]string, error) { return filepath.Glob(n.Lab.Path("log", n.Name+"-*.log")) }
