package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Supernode is a real `shoal supernode`.
type Supernode struct {
	*Process
	// Address is what a node's config names: ID@host:port.
	Address string
	// Control is its control socket.
	Control string
	// Metrics is the host:port of its metrics.
	Metrics string

	lab *Lab
}

// Node is a real `shoal node`.
type Node struct {
	*Process
	// Socket is what containerd's proxy plugin names.
	Socket string
	// Control is its control socket.
	Control string
	// Root is where it keeps its diffs and mounts.
	Root string
	// Listen is the host:port for other nodes.
	Listen string
	// Metrics is the host:port of its metrics.
	Metrics string
	// Mirror is the host:port of its registry mirror, and MirrorCA the file with the
	// authority that its certificate is from.
	Mirror, MirrorCA string

	lab     *Lab
	program string // under keep: where it takes the program from
}

// addressLine finds in a supernode's log the address it prints for nodes.
var addressLine = regexp.MustCompile(`12D3[0-9A-Za-z]+@[0-9a-zA-Z.:\[\]]+:[0-9]+`)

// TokenFile has the token that everything in the lab joins with, unless extra
// names another file.
func (l *Lab) TokenFile() string { return l.Path("token") }

// defaults are lines for keys that extra does not set.
func defaults(extra string, lines map[string]string) string {
	for key, value := range lines {
		if !regexp.MustCompile(`(?m)^` + key + ` *=`).MatchString(extra) {
			extra = key + " = " + value + "\n" + extra
		}
	}
	return extra
}

// StartSupernode starts a supernode below Dir/name. extra is added to the end
// of its config file.
func (l *Lab) StartSupernode(ctx context.Context, name, extra string) (*Supernode, error) {
	listen, err := l.freeAddr()
	if err != nil {
		return nil, err
	}
	metrics, err := l.freeAddr()
	if err != nil {
		return nil, err
	}
	s := &Supernode{Control: l.Path(name, "control.sock"), Metrics: metrics, lab: l}
	cfg, err := l.writeFile(name+".toml", fmt.Sprintf(`version = 1
root = %q
listen = [%q]
control_address = %q
metrics_address = %q
%s`, l.Path(name), listen, s.Control, metrics, defaults(extra, map[string]string{"token_file": strconv.Quote(l.TokenFile())})))
	if err != nil {
		return nil, err
	}
	if s.Process, err = l.Start(name, "shoal", nil, "supernode", "--config", cfg); err != nil {
		return nil, err
	}
	err = WaitFor(ctx, "supernode", 20*time.Second, func() error {
		if err := s.Alive(); err != nil {
			return err
		}
		b, err := os.ReadFile(s.Log)
		if err != nil {
			return err
		}
		if s.Address = addressLine.FindString(string(b)); s.Address == "" {
			return fmt.Errorf("it has not printed its address")
		}
		return nil
	})
	return s, err
}

// StartSupernodes starts n supernodes that know each other, below Dir/NAME0 and
// so on. As an operator would, it starts each alone first, to learn its address.
// The name must be new to the lab: logs and stores of a name are kept.
func (l *Lab) StartSupernodes(ctx context.Context, name string, n int, extra string) ([]*Supernode, error) {
	var all []*Supernode
	var addresses []string
	for i := range n {
		s, err := l.StartSupernode(ctx, fmt.Sprintf("%s%d", name, i), extra)
		if err == nil {
			err = s.Stop()
		}
		if err != nil {
			return nil, err
		}
		all, addresses = append(all, s), append(addresses, strconv.Quote(s.Address))
	}
	for _, s := range all {
		cfg := l.Path(s.Name + ".toml")
		b, err := os.ReadFile(cfg)
		if err != nil {
			return nil, err
		}
		siblings := "siblings = [" + strings.Join(addresses, ", ") + "]\n"
		if err := os.WriteFile(cfg, append([]byte(siblings), b...), 0o600); err != nil {
			return nil, err
		}
		if s.Process, err = l.Start(s.Name, "shoal", nil, "supernode", "--config", cfg); err != nil {
			return nil, err
		}
	}
	for _, s := range all {
		if err := WaitFor(ctx, "supernode", 20*time.Second, func() error {
			return errors.Join(s.ready(ctx), s.Alive())
		}); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Settle waits until the supernode has compressed all that it has stored, as it
// does when nothing is being ingested.
func (s *Supernode) Settle(ctx context.Context, timeout time.Duration) error {
	return WaitFor(ctx, "supernode settled", timeout, func() error {
		n, err := s.Metric(ctx, "shoal_supernode_uncompressed_bytes")
		if err == nil && n > 0 {
			err = fmt.Errorf("%.0f bytes are still to be compressed", n)
		}
		return err
	})
}

// Via returns the supernode's address as seen through a link.
func (s *Supernode) Via(k *Link) string {
	id, _, _ := strings.Cut(s.Address, "@")
	return id + "@" + k.Addr
}

// HostPort is the address without the ID, for a Link's target.
func (s *Supernode) HostPort() string {
	_, addr, _ := strings.Cut(s.Address, "@")
	return addr
}

// StartNode starts a node below Dir/name. supernode is an address, or several
// with commas between them; with none it embeds one.
func (l *Lab) StartNode(ctx context.Context, name, supernode, extra string) (*Node, error) {
	n, cfg, err := l.prepareNode(name, supernode, extra)
	if err != nil {
		return nil, err
	}
	if n.Process, err = l.Start(name, "shoal", nil, "node", "--config", cfg); err != nil {
		return nil, err
	}
	return n, n.waitUp(ctx)
}

// prepareNode writes a node's config and returns its path.
func (l *Lab) prepareNode(name, supernode, extra string) (*Node, string, error) {
	metrics, err := l.freeAddr()
	if err != nil {
		return nil, "", err
	}
	mirror, err := l.freeAddr()
	if err != nil {
		return nil, "", err
	}
	listen, err := l.freeAddr()
	if err != nil {
		return nil, "", err
	}
	n := &Node{
		Socket: l.Path(name, "shoal.sock"), Control: l.Path(name, "control.sock"),
		Root: l.Path(name, "r"), Listen: listen, Metrics: metrics, Mirror: mirror, MirrorCA: l.Path(name, "r", "mirror-ca.pem"), lab: l,
	}
	extra = defaults(extra, map[string]string{
		"token_file": strconv.Quote(l.TokenFile()), "listen": fmt.Sprintf("[%q]", listen),
		// What a container has begun goes on when it has ended, as fast as it can: tests and
		// measurements run one to have all of an image fetched.
		"prefetch_after_exit": "true", "prefetch_after_pull": "false", "prefetch_rate": `"0B"`,
		// Pulls in the lab wait in Prepare for images that the supernode has yet to fetch.
		"prepare_timeout": `"5m"`,
	})
	list := "[]"
	if supernode != "" {
		list = `["` + strings.ReplaceAll(supernode, ",", `", "`) + `"]`
	}
	cfg, err := l.writeFile(name+".toml", fmt.Sprintf(`version = 1
root = %q
address = %q
control_address = %q
metrics_address = %q
mirror_address = %q
supernodes = %s
%s`, n.Root, n.Socket, n.Control, metrics, mirror, list, extra))
	return n, cfg, err
}

// waitUp waits until the node answers.
func (n *Node) waitUp(ctx context.Context) error {
	return WaitFor(ctx, "node", 30*time.Second, func() error {
		if err := n.Alive(); err != nil {
			return err
		}
		_, err := n.Status(ctx)
		return err
	})
}

// RestartNode starts the node again on the same directories, after Stop or Kill.
func (l *Lab) RestartNode(ctx context.Context, n *Node) (*Node, error) {
	again := *n
	var err error
	if again.Process, err = n.lab.Start(n.Name, "shoal", nil, "node", "--config", l.Path(n.Name+".toml")); err != nil {
		return nil, err
	}
	return &again, again.waitUp(ctx)
}

// RestartSupernode starts the supernode again on the same directory and address,
// after Stop or Kill.
func (l *Lab) RestartSupernode(ctx context.Context, s *Supernode) (*Supernode, error) {
	again := *s
	var err error
	if again.Process, err = l.Start(s.Name, "shoal", nil, "supernode", "--config", l.Path(s.Name+".toml")); err != nil {
		return nil, err
	}
	return &again, WaitFor(ctx, "supernode", 20*time.Second, func() error {
		if err := again.Alive(); err != nil {
			return err
		}
		return again.ready(ctx)
	})
}

// NodeStatus is what `shoal status --output json` prints.
type NodeStatus struct {
	Version string
	Images  []struct {
		Ref    string
		Layers []NodeLayer
	}
	NotLazy []NotLazy `json:"not_lazy"`
}

// NotLazy says why an image was not lazy when it was pulled.
type NotLazy struct{ Ref, Cause, Why string }

// NodeLayer is a layer in a NodeStatus; Size and Local are bytes.
type NodeLayer struct {
	DiffID string `json:"diff_id"`
	Size   int64
	Local  int64
	Mount  string
	Proof  string
}

// WaitLocal waits until every byte of ref is on the node's disk.
func (n *Node) WaitLocal(ctx context.Context, ref string, timeout time.Duration) error {
	return n.waitLayers(ctx, "all of "+ref+" on the node", ref, timeout, func(l NodeLayer) error {
		if l.Local < l.Size {
			return fmt.Errorf("%s: %d of %d bytes", l.DiffID, l.Local, l.Size)
		}
		return nil
	})
}

// WaitProven waits until ref is on the node's disk and every layer's index has been
// proven, which fetches a little more: until then the node's traffic is not over.
func (n *Node) WaitProven(ctx context.Context, ref string, timeout time.Duration) error {
	return n.waitLayers(ctx, "proof of "+ref+" on the node", ref, timeout, func(l NodeLayer) error {
		if l.Proof != "proven" {
			return fmt.Errorf("%s is %q", l.DiffID, l.Proof)
		}
		return nil
	})
}

// waitLayers waits until ok says so of every layer of ref.
func (n *Node) waitLayers(ctx context.Context, what, ref string, timeout time.Duration, ok func(NodeLayer) error) error {
	return WaitFor(ctx, what, timeout, func() error {
		st, err := n.Status(ctx)
		if err != nil {
			return err
		}
		for _, im := range st.Images {
			if im.Ref != ref {
				continue
			}
			for _, l := range im.Layers {
				if err := ok(l); err != nil {
					return err
				}
			}
			return nil
		}
		return fmt.Errorf("shoal status does not list %s", ref)
	})
}
