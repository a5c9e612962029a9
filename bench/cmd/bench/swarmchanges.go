package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// sceneChanges is what else happens to a datacenter: nodes that come one after
// another, an upgrade, half of the nodes gone, a partition, the registry gone.
// What counts is that everybody gets everything; the rest is said as it is seen.
func (w *swarmWorld) sceneChanges(ctx context.Context, r *report.Report) error {
	s, err := w.supernode(ctx, w.o.fewRate())
	if err != nil {
		return err
	}
	if err := w.warm(ctx, s, w.o.image, "v1"); err != nil {
		return err
	}
	one, err := w.image(ctx, "v1")
	if err != nil {
		return err
	}
	two, err := w.image(ctx, "v2")
	if err != nil {
		return err
	}
	hosts := w.few[:fewNodes]
	var failed int
	fail := func(what string, err error) {
		if err != nil {
			say("%s: %v", what, err)
			failed++
		}
	}

	// Rolling: every second another node.
	nodes, err := w.nodesOn(ctx, hosts, s.Address, "")
	if err != nil {
		return err
	}
	_, sent, err := s.host.Bytes()
	if err != nil {
		return err
	}
	var all sync.WaitGroup
	errs := make([]error, len(nodes))
	for i, n := range nodes {
		all.Go(func() { errs[i] = w.prefetch(ctx, n, one) })
		time.Sleep(time.Second)
	}
	all.Wait()
	fail("rolling", errors.Join(errs...))
	_, after, err := s.host.Bytes()
	if err != nil {
		return err
	}
	say("rolling: the supernode sent %.1f MB to %d nodes", float64(after-sent)/1e6, len(nodes))

	// Upgrade: the new version's bytes travel once.
	if err := w.warm(ctx, s, w.o.image, "v2"); err != nil {
		return err
	}
	p, err := w.prefetchAll(ctx, nodes, two)
	fail("upgrade", err)
	say("upgrade: v2 is on all nodes after %.2f s", quantile(seconds(p.took), 1))
	if err := w.stopNodes(nodes); err != nil {
		return err
	}

	// Half of the nodes are killed half-way.
	if nodes, err = w.nodesOn(ctx, hosts, s.Address, ""); err != nil {
		return err
	}
	kept := nodes[len(nodes)/2:]
	err = w.during(ctx, one, kept, nodes[:len(nodes)/2], func() error {
		for _, n := range nodes[:len(nodes)/2] {
			if err := n.Kill(); err != nil {
				return err
			}
		}
		return nil
	})
	fail("half of the nodes killed", err)
	if err := w.stopNodes(nodes); err != nil {
		return err
	}

	// A partition between the zones, healed after five seconds. Supernode and
	// registry are in zone 0.
	if nodes, err = w.nodesOn(ctx, hosts, s.Address, ""); err != nil {
		return err
	}
	err = w.during(ctx, one, nodes, nil, func() error {
		if err := w.net.Partition(ctx, 1, true); err != nil {
			return err
		}
		time.Sleep(5 * time.Second)
		return w.net.Partition(ctx, 1, false)
	})
	fail("partition and heal", err)

	// The registry is gone: a new node still gets what the supernode has.
	if err := w.upstream.SetLink(ctx, false); err != nil {
		return err
	}
	late, err := w.nodesOn(ctx, w.few[len(hosts):], s.Address, "")
	if err == nil {
		_, err = w.prefetchAll(ctx, late, one)
	}
	fail("registry gone", err)
	if err := w.upstream.SetLink(ctx, true); err != nil {
		return err
	}
	r.Add("rolling, upgrade, half of the nodes killed, partition, registry gone: scenes in which a node lacked something", "", report.AtMost, 0, float64(failed))
	return errors.Join(w.stopNodes(append(nodes, late...)), s.Stop())
}

// during prefetches on all nodes at once, lets something happen half-way, and
// returns what went wrong on those that are to finish.
func (w *swarmWorld) during(ctx context.Context, im *lab.Image, finish, others []*swarmNode, happen func() error) error {
	errs := make([]error, len(finish))
	var all sync.WaitGroup
	for i, n := range finish {
		all.Go(func() { errs[i] = w.prefetch(ctx, n, im) })
	}
	for _, n := range others {
		all.Go(func() { _ = w.prefetch(ctx, n, im) }) // it will not finish
	}
	err := w.halfway(ctx, finish[0], im.Ref)
	if err == nil {
		err = happen()
	}
	all.Wait()
	return errors.Join(append(errs, err)...)
}

// halfway waits until a node has half of an image.
func (w *swarmWorld) halfway(ctx context.Context, n *swarmNode, ref string) error {
	return lab.WaitFor(ctx, "half of "+ref+" on "+n.Name, 5*time.Minute, func() error {
		local, size, err := n.Local(ctx, ref)
		if err != nil {
			return err
		}
		if size > 0 && 2*local >= size {
			return nil
		}
		return errors.New("less than half is there")
	})
}

// sceneSupernodeKilled kills one of two supernodes half-way through the first
// pull of an image by all nodes.
func (w *swarmWorld) sceneSupernodeKilled(ctx context.Context, r *report.Report) error {
	im, err := w.image(ctx, "v1")
	if err != nil {
		return err
	}
	one, _, err := w.registryCost(ctx, w.hosts[:1], im)
	if err != nil {
		return err
	}
	h, err := w.net.NewHost(ctx, w.name("s"), 0, supernodeRate(w.o.nodeRate()))
	if err != nil {
		return err
	}
	supers, err := w.At(h).StartSupernodes(ctx, w.name("pair")+"-", 2, fmt.Sprintf("\n[registry]\nconfig_path = %q\n", w.certs()))
	if err != nil {
		return err
	}
	nodes, err := w.nodesOn(ctx, w.hosts, supers[0].Address+","+supers[1].Address, "")
	if err != nil {
		return err
	}
	_, before, err := w.upstream.Bytes()
	if err != nil {
		return err
	}
	var inFlight int64
	killed := make(chan error, 1)
	go func() {
		killed <- func() error {
			if err := lab.WaitFor(ctx, "half of the image from the registry", 5*time.Minute, func() error {
				_, sent, err := w.upstream.Bytes()
				if err == nil && 2*(sent-before) < im.Compressed() {
					err = errors.New("less than half was sent")
				}
				return err
			}); err != nil {
				return err
			}
			if inFlight, err = notStored(im, supers...); err != nil {
				return err
			}
			return supers[1].Kill()
		}()
	}()
	_, err = w.prefetchAll(ctx, nodes, im)
	if err := errors.Join(err, <-killed); err != nil {
		return err
	}
	_, after, err := w.upstream.Bytes()
	if err != nil {
		return err
	}
	say("a supernode killed half-way: %d bytes from the registry, %d for one node with one supernode, %d were in flight", after-before, one, inFlight)
	r.Add("registry bytes, a supernode killed half-way, less the layers in flight", "x", report.AtMost, 1.05, round2(float64(after-before-inFlight)/float64(one)))
	return errors.Join(w.stopNodes(nodes), supers[0].Stop())
}

// notStored sums the layers of an image that no supernode has logged as stored.
func notStored(im *lab.Image, supers ...*lab.Supernode) (int64, error) {
	var logs strings.Builder
	for _, s := range supers {
		b, err := os.ReadFile(s.Log)
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, "layer stored") {
				logs.WriteString(line)
			}
		}
	}
	var n int64
	for _, l := range im.Layers {
		if !strings.Contains(logs.String(), l.Digest) {
			n += l.Size
		}
	}
	return n, nil
}

// quantileLine is what the benchmark of package exchange prints beside its times.
var quantileLine = regexp.MustCompile(`([0-9.]+) (p50|p99\.9)-us`)

// sceneLatency measures one chunk at a time, on unshaped loopback, by the
// benchmark of the package that does it.
func (w *swarmWorld) sceneLatency(ctx context.Context, r *report.Report) error {
	samples := map[string][]float64{}
	for range w.o.runs {
		cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkDemand$/^zstd=false$", "-benchtime", "5000x", "./p2p/exchange")
		cmd.Dir = ".."
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		for _, m := range quantileLine.FindAllStringSubmatch(string(out), -1) {
			v, err := strconv.ParseFloat(m[1], 64)
			if err != nil {
				return err
			}
			samples[m[2]] = append(samples[m[2]], v/1e3)
		}
	}
	for q, bar := range map[string]float64{"p50": 0.5, "p99.9": 5} {
		if len(samples[q]) == 0 {
			return fmt.Errorf("BenchmarkDemand printed no %s", q)
		}
		r.Add("chunk hit at a peer or supernode, unshaped loopback, 64 KiB: "+q, "ms", report.AtMost, bar, samples[q]...)
	}
	return nil
}
