package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// swarmWorld is a datacenter of two zones in network namespaces: a registry and
// the supernodes in zone 0, nodes in both, each with a link of its own.
type swarmWorld struct {
	*lab.Lab
	o        *swarmOptions
	net      *lab.Net
	registry *lab.Registry
	// upstream is the registry's machine: what leaves it is what it sent.
	upstream *lab.Host
	hosts    []*lab.Host // of nodes, used again and again
	few      []*lab.Host // the same with faster links, for scenes with few nodes
	n        int
}

// swarmSupernode is a supernode and the machine it runs on.
type swarmSupernode struct {
	*lab.Supernode
	host *lab.Host
}

// swarmNode is a node and the machine it runs on.
type swarmNode struct {
	*lab.Node
	host *lab.Host
}

func newSwarmWorld(ctx context.Context, o *swarmOptions, images ...string) (_ *swarmWorld, err error) {
	if err := buildImages(ctx, images...); err != nil {
		return nil, err
	}
	dir, err := lab.ImagesDir()
	if err != nil {
		return nil, err
	}
	l, err := lab.New(o.bin)
	if err != nil {
		return nil, err
	}
	w := &swarmWorld{Lab: l, o: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if w.net, err = l.NewNet(ctx, 2); err != nil {
		return nil, err
	}
	if w.upstream, err = w.net.NewHost(ctx, "registry", 0, lab.Gigabit); err != nil {
		return nil, err
	}
	if w.registry, err = l.At(w.upstream).StartRegistry(ctx, "registry", filepath.Join(dir, "registry"), ""); err != nil {
		return nil, err
	}
	if err := w.writeHosts(); err != nil {
		return nil, err
	}
	if w.hosts, err = w.machines(ctx, "h", o.nodes, o.nodeRate()); err != nil {
		return nil, err
	}
	if w.few, err = w.machines(ctx, "f", fewNodes+1, o.fewRate()); err != nil {
		return nil, err
	}
	return w, nil
}

// fewNodes is how many nodes take part in scenes with few, at most; one more may
// come late.
const fewNodes = 16

// machines makes n machines for nodes. Zones alternate, so that every number of
// nodes is spread over both.
func (w *swarmWorld) machines(ctx context.Context, kind string, n int, rate lab.Rate) ([]*lab.Host, error) {
	var hosts []*lab.Host
	for i := range n {
		h, err := w.net.NewHost(ctx, fmt.Sprintf("%s%d", kind, i), i%2, rate)
		if err != nil {
			return nil, err
		}
		hosts = append(hosts, h)
	}
	return hosts, nil
}

// certs is the directory of hosts.toml files by which everybody finds the registry.
func (w *swarmWorld) certs() string { return w.Path("certs.d") }

func (w *swarmWorld) writeHosts() error {
	dir := filepath.Join(w.certs(), w.registry.Addr)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(fmt.Sprintf("server = %q\n", "http://"+w.registry.Addr)), 0o600)
}

func (w *swarmWorld) name(kind string) string {
	w.n++
	return kind + strconv.Itoa(w.n)
}

// supernode starts a supernode on a machine of its own, for nodes with such links.
func (w *swarmWorld) supernode(ctx context.Context, nodes lab.Rate) (*swarmSupernode, error) {
	name := w.name("s")
	h, err := w.net.NewHost(ctx, name, 0, supernodeRate(nodes))
	if err != nil {
		return nil, err
	}
	s, err := w.At(h).StartSupernode(ctx, name, fmt.Sprintf("\n[registry]\nconfig_path = %q\n", w.certs()))
	return &swarmSupernode{s, h}, err
}

// warm has a supernode take in an image, and waits until it has settled.
func (w *swarmWorld) warm(ctx context.Context, s *swarmSupernode, image, tag string) error {
	if _, err := w.Run(ctx, "shoal", "prefetch", "--control", s.Control, w.ref(image, tag)); err != nil {
		return err
	}
	return s.Settle(ctx, 5*time.Minute)
}

func (w *swarmWorld) ref(image, tag string) string { return w.registry.Addr + "/" + image + ":" + tag }

// nodesOn starts one node on each of the machines. extra goes into their config.
func (w *swarmWorld) nodesOn(ctx context.Context, hosts []*lab.Host, supernode string, extra string) ([]*swarmNode, error) {
	nodes := make([]*swarmNode, len(hosts))
	for i, h := range hosts {
		// One at a time: they share two cores, and what is measured comes later.
		n, err := w.At(h).StartNode(ctx, w.name("n"), supernode, fmt.Sprintf("zone = %q\n%s", "z"+strconv.Itoa(h.Zone), extra))
		if err != nil {
			return nodes, err
		}
		nodes[i] = &swarmNode{n, h}
	}
	return nodes, nil
}

// stopNodes stops nodes and removes what they kept: disks are not endless.
func (w *swarmWorld) stopNodes(nodes []*swarmNode) error {
	errs := make([]error, len(nodes))
	var all sync.WaitGroup
	for i, n := range nodes {
		if n == nil {
			continue
		}
		all.Go(func() {
			errs[i] = errors.Join(n.Stop(), w.RemoveAll(n.Root))
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// prefetch pulls an image on a node, for a container, and waits until every byte of it is on its
// disk, checked against the index. The proof comes after that, when nobody else
// wants the processor.
func (w *swarmWorld) prefetch(ctx context.Context, n *swarmNode, im *lab.Image) error {
	if err := n.Pull(ctx, im); err != nil {
		return err
	}
	if err := n.Create(ctx, im, "all-of-"+im.Manifest.String()); err != nil {
		return err
	}
	// Asking costs processor time, and many are asked.
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := n.Alive(); err != nil {
			return err
		}
		if local, size, err := n.Local(ctx, im.Ref); err == nil && size > 0 && local == size {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// image is what nodes are to know of an image to pull it.
func (w *swarmWorld) image(ctx context.Context, tag string) (*lab.Image, error) {
	return w.registry.Image(ctx, w.o.image, tag)
}

// proven waits until the image is proven on all nodes: then its traffic is over.
func (w *swarmWorld) proven(ctx context.Context, nodes []*swarmNode, im *lab.Image) error {
	for _, n := range nodes {
		if err := n.WaitProven(ctx, im.Ref, 10*time.Minute); err != nil {
			return err
		}
	}
	return nil
}

// pulled is what came of bringing an image to some nodes at once.
type pulled struct {
	took []time.Duration // until each node had every byte
	busy float64         // share of the processors, until the last had
}

// prefetchAll prefetches on all nodes at once.
func (w *swarmWorld) prefetchAll(ctx context.Context, nodes []*swarmNode, im *lab.Image) (p pulled, err error) {
	before, err := readProcessorTime()
	if err != nil {
		return p, err
	}
	p.took = make([]time.Duration, len(nodes))
	errs := make([]error, len(nodes))
	var all sync.WaitGroup
	began := time.Now()
	for i, n := range nodes {
		all.Go(func() {
			errs[i] = w.prefetch(ctx, n, im)
			p.took[i] = time.Since(began)
		})
	}
	all.Wait()
	after, err := readProcessorTime()
	p.busy = after.since(before)
	return p, errors.Join(append(errs, err)...)
}

// sources says where the bytes of chunks on nodes came from, and what went wrong
// on the way.
func (w *swarmWorld) sources(ctx context.Context, nodes []*swarmNode) error {
	var text strings.Builder
	for _, m := range []struct {
		name, what string
		unit       float64
	}{
		{`shoal_node_received_bytes_total{source="supernode",zone=""}`, "MB from the supernode", 1e6},
		{`shoal_node_received_bytes_total{source="peer",zone="same"}`, "MB from the same zone", 1e6},
		{`shoal_node_received_bytes_total{source="peer",zone="other"}`, "MB from the other zone", 1e6},
		{`shoal_node_fetched_bytes_total{priority="demand"}`, "MB on demand", 1e6},
		{`shoal_node_fetched_bytes_total{priority="startup"}`, "MB by a startup profile", 1e6},
		{`shoal_node_fetched_bytes_total{priority="proof"}`, "MB of tar headers", 1e6},
		{"shoal_node_duplicate_bytes_total", "MB twice", 1e6},
		{"shoal_node_hedges_total", "hedges", 1},
		{`shoal_node_peer_failures_total{reason="busy"}`, "busy", 1},
		{`shoal_node_peer_failures_total{reason="missing"}`, "missing", 1},
		{`shoal_node_peer_failures_total{reason="slow"}`, "slow", 1},
		{`shoal_node_peer_failures_total{reason="dead"}`, "dead", 1},
	} {
		var sum float64
		for _, n := range nodes {
			v, err := n.Metric(ctx, m.name)
			if err != nil {
				return err
			}
			sum += v
		}
		fmt.Fprintf(&text, ", %.4g %s", sum/m.unit, m.what)
	}
	say("  chunks, uncompressed: %s", strings.TrimPrefix(text.String(), ", "))
	return nil
}
