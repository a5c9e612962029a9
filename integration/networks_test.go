package integration

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// ownNet is machines in a network of their own: one with a registry and a supernode, and
// those that a test adds, with the config files that shoal prints.
type ownNet struct {
	*lab.Lab
	net      *lab.Net
	super    *lab.Supernode
	at       *lab.Host // of registry and supernode
	registry *lab.Registry
}

// newOwnNet makes it; prepare, if not nil, does something to the supernode's machine
// before anything starts there.
func newOwnNet(t *testing.T, ipv4, ipv6 bool, prepare func(*lab.Host)) *ownNet {
	t.Helper()
	ctx := t.Context()
	w := &ownNet{Lab: newLab(t)}
	w.net = must(w.NewNet(ctx, 1))(t)
	w.net.IPv4, w.net.IPv6 = ipv4, ipv6
	w.at = must(w.net.NewHost(ctx, "super", 0, 0))(t)
	if prepare != nil {
		prepare(w.at)
	}
	w.registry = must(w.At(w.at).StartRegistry(ctx, "registry", w.Path("images"), ""))(t)
	w.super = must(w.At(w.at).StartDefaultSupernode(ctx, "supernode", map[string]string{"config_path": strconv.Quote(w.certs(t))}))(t)
	return w
}

// certs is a directory of hosts.toml by which the registry is found.
func (w *ownNet) certs(t *testing.T) string {
	t.Helper()
	dir := w.Path("certs")
	noError(t, os.MkdirAll(filepath.Join(dir, "_default"), 0o700))
	noError(t, os.WriteFile(filepath.Join(dir, "_default", "hosts.toml"), fmt.Appendf(nil, "server = %q\n", "http://"+w.registry.Addr), 0o600))
	return dir
}

// fileContent is what is in file i of an image: 60,000 bytes that do not compress.
func fileContent(name string, i int) string {
	b := make([]byte, 60_000)
	_, _ = rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, name, i))).Read(b)
	return string(b)
}

// image pushes an image of n files, has the supernode fetch it, and returns it with
// what is in the files.
func (w *ownNet) image(t *testing.T, name string, n int, control string) (*lab.Image, map[string]string) {
	t.Helper()
	files := map[string]string{}
	entries := []entry{dir("a")}
	for i := range n {
		f := fmt.Sprintf("a/%03d", i)
		files[f] = fileContent(name, i)
		entries = append(entries, file(f, files[f]))
	}
	must(w.registry.Push(t.Context(), name, "v1", []string{"/bin/true"}, layer(t, entries...)))(t)
	im := must(w.registry.Image(t.Context(), name, "v1"))(t)
	must(w.Run(t.Context(), "shoal", "prefetch", "--control", control, im.Ref))(t)
	return im, files
}

// view pulls an image, mounts it and returns where.
func (w *ownNet) view(t *testing.T, n *lab.Node, im *lab.Image) string {
	t.Helper()
	noError(t, n.Pull(t.Context(), im))
	dir := must(os.MkdirTemp(w.Dir, "view"))(t)
	unmount := must(n.Mount(t.Context(), im, filepath.Base(dir), dir))(t)
	w.OnClose(unmount)
	return dir
}

// check reads all files below dir.
func check(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

// announced waits until the supernode has n members, and returns where others are told to
// dial them, by the machine that they come from.
func (w *ownNet) announced(t *testing.T, n int) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	noError(t, lab.WaitFor(t.Context(), fmt.Sprint(n, " members"), 30*time.Second, func() error {
		text, err := w.Run(t.Context(), "shoal", "members", "--control", w.super.Control, "--output", "json")
		if err != nil {
			return err
		}
		var list []struct {
			Address   string
			Announced []string
		}
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			return err
		}
		clear(out)
		for _, m := range list {
			out[m.Address[:strings.LastIndexByte(m.Address, ':')]] = m.Announced
		}
		if len(out) != n {
			return fmt.Errorf("%s", text)
		}
		return nil
	}))
	return out
}

// TestNetworks: with the config files that shoal prints, and no key in them but the
// supernode's address, nodes pull, and get from each other what they read, on networks
// of either family and of both.
func TestNetworks(t *testing.T) {
	for _, c := range []struct {
		name       string
		ipv4, ipv6 bool
	}{{"IPv4", true, false}, {"IPv6", false, true}, {"both", true, true}} {
		t.Run(c.name, func(t *testing.T) {
			ctx := t.Context()
			w := newOwnNet(t, c.ipv4, c.ipv6, nil)
			im, files := w.image(t, "shared", 60, w.super.Control)
			var nodes []*lab.Node
			want := map[string][]string{}
			for i := range 3 {
				h := must(w.net.NewHost(ctx, fmt.Sprint("m", i), 0, 0))(t)
				from, super := h.IP, w.at.IP
				if h.IP6 != "" && i%2 == 1 { // reached by the other family
					from, super = h.IP6, w.at.IP6
				}
				addrs := []string{from + ":7703"}
				if strings.Contains(from, ":") {
					from = "[" + from + "]"
					addrs = []string{from + ":7703"}
				}
				switch other := ""; {
				case !c.ipv4 || !c.ipv6:
				default:
					if other = "[" + h.IP6 + "]"; other == from {
						other = h.IP
					}
					addrs = append(addrs, other+":7703")
				}
				want[from] = addrs
				nodes = append(nodes, must(w.At(h).StartDefaultNode(ctx, fmt.Sprint("node", i), []string{w.super.At(super)}, nil))(t))
			}
			if got := w.announced(t, len(nodes)); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("others are told of %v, want %v", got, want)
			}
			for _, n := range nodes {
				check(t, w.view(t, n, im), files)
				noError(t, n.WaitLocal(ctx, im.Ref, 60*time.Second))
			}
			if got := must(nodes[2].Metric(ctx, "shoal_node_received_bytes_total"))(t); got == 0 {
				t.Error("the last node got nothing from the others")
			}
		})
	}
}

// tangle gives a machine interfaces as Docker, CNI plugins and kube-proxy make them (whose
// kube-ipvs0 is a dummy, which not every kernel has; it is down, as that one is).
func tangle(t *testing.T, h *lab.Host) {
	t.Helper()
	for _, args := range []string{
		"link add docker0 up type bridge", "addr add 172.17.0.1/16 dev docker0",
		"link add veth1 up master docker0 type veth peer name ceth1",
		"link add cni0 up type bridge", "addr add 10.244.1.1/24 dev cni0", "-6 addr add fd88::1/64 dev cni0 nodad",
		"link add kube-ipvs0 type bridge", "addr add 10.96.0.1/32 dev kube-ipvs0", "addr add 10.96.0.10/32 dev kube-ipvs0",
		"link add lxc1 up type veth peer name lxc2", "link set lxc2 up", "addr add 10.0.9.9/32 dev lxc1",
	} {
		noError(t, h.Run(t.Context(), "ip", strings.Fields(args)...))
	}
}

// TestAnnounced: of a machine with many interfaces others are told those addresses alone
// at which they can dial it, or what the config says.
func TestAnnounced(t *testing.T) {
	ctx := t.Context()
	w := newOwnNet(t, true, true, func(h *lab.Host) { tangle(t, h) })
	for _, addr := range must(w.super.Printed())(t) {
		if _, at, _ := strings.Cut(addr, "@"); !slices.Contains([]string{w.at.IP + ":7700", "[" + w.at.IP6 + "]:7700", "127.0.0.1:7700", "[::1]:7700"}, at) {
			t.Errorf("the supernode tells operators to use %s", addr)
		}
	}
	h := must(w.net.NewHost(ctx, "node", 0, 0))(t)
	tangle(t, h)
	noError(t, w.net.SecondLink(ctx, h, "10.88.0.7/16"))
	node := must(w.At(h).StartDefaultNode(ctx, "node", []string{w.super.At(w.at.IP)}, nil))(t)
	first := []string{h.IP + ":7703", "[" + h.IP6 + "]:7703"}
	told := func(want []string) {
		t.Helper()
		noError(t, lab.WaitFor(ctx, fmt.Sprint("announced ", want), 30*time.Second, func() error {
			if got := w.announced(t, 1)[h.IP]; !slices.Equal(got, want) {
				return fmt.Errorf("others are told of %v", got)
			}
			return nil
		}))
	}
	told(first)
	// An address that comes later is told as well.
	noError(t, h.Run(ctx, "ip", "addr", "add", "10.77.9.9/16", "dev", "eth0"))
	told([]string{first[0], "10.77.9.9:7703", first[1]})
	noError(t, node.Stop())
	set := map[string]string{"announce": `["203.0.113.9:17703"]`}
	must(w.At(h).StartDefaultNode(ctx, "again", []string{w.super.At(w.at.IP)}, set))(t)
	told([]string{"203.0.113.9:17703"})
}

// TestBehindNAT: a node that nobody can dial uses the supernode and other nodes, and
// those read what they read although it is on their list.
func TestBehindNAT(t *testing.T) {
	ctx := t.Context()
	w := newOwnNet(t, true, false, nil)
	im, files := w.image(t, "shared", 60, w.super.Control)
	router := must(w.net.NewHost(ctx, "router", 0, 0))(t)
	inner := must(w.net.NewHostBehind(ctx, "inner", router))(t)
	before := must(w.net.NewHost(ctx, "before", 0, 0))(t)
	after := must(w.net.NewHost(ctx, "after", 0, 0))(t)
	super := []string{w.super.At(w.at.IP)}
	first := must(w.At(before).StartDefaultNode(ctx, "first", super, nil))(t)
	check(t, w.view(t, first, im), files)
	noError(t, first.WaitLocal(ctx, im.Ref, 60*time.Second))
	hidden := must(w.At(inner).StartDefaultNode(ctx, "hidden", super, nil))(t)
	if got := w.announced(t, 2); !slices.Equal(got[router.IP], []string{inner.IP + ":7703"}) {
		t.Errorf("others are told of %v", got)
	}
	check(t, w.view(t, hidden, im), files)
	noError(t, hidden.WaitLocal(ctx, im.Ref, 60*time.Second))
	if got := must(hidden.Metric(ctx, "shoal_node_received_bytes_total"))(t); got == 0 {
		t.Error("the node behind address translation got nothing from the other one")
	}
	last := must(w.At(after).StartDefaultNode(ctx, "last", super, nil))(t)
	began := time.Now()
	check(t, w.view(t, last, im), files)
	t.Logf("%d files read in %v", len(files), time.Since(began))
	noError(t, last.WaitLocal(ctx, im.Ref, 60*time.Second))
}
