package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// swarmOptions are those of `bench swarm`.
type swarmOptions struct {
	*options
	nodes  int
	mbit   int
	image  string
	scenes []string
}

// nodeRate is a node's link where all of them get an image at once. redis costs 5 s
// of a processor for each node (TLS, zstd, SHA-256, disk, and the kernel for bridges
// and shaping); with 32 of them on two processors a faster link than 5 Mbit/s is
// not what is measured: at 10 Mbit/s these were 91 % busy.
func (o *swarmOptions) nodeRate() lab.Rate { return lab.Rate(o.mbit) * 1e6 / 8 }

// halfRate is a node's link in the start burst, where half of them pass on all that they get.
func (o *swarmOptions) halfRate() lab.Rate { return 2 * o.nodeRate() }

// fewRate is a node's link where half of them or less take part.
func (o *swarmOptions) fewRate() lab.Rate { return 10 * o.nodeRate() }

// supernodeRate is a supernode's link: ten times a node's, as 10 Gbit/s is to 1.
func supernodeRate(node lab.Rate) lab.Rate { return 10 * node }

// scene is one thing that happens to a datacenter.
type scene struct {
	name string
	run  func(*swarmWorld, context.Context, *report.Report) error
}

var swarmScenes = []scene{
	{"few", (*swarmWorld).sceneFew},
	{"registry", (*swarmWorld).sceneRegistry},
	{"all", (*swarmWorld).sceneAll},
	{"supernode-killed", (*swarmWorld).sceneSupernodeKilled},
	{"restart", (*swarmWorld).sceneRestart},
	{"hang", (*swarmWorld).sceneHang},
	{"burst", (*swarmWorld).sceneBurst},
	{"beside", (*swarmWorld).sceneBeside},
	{"parent-killed", (*swarmWorld).sceneParentKilled},
	{"changes", (*swarmWorld).sceneChanges},
	{"latency", (*swarmWorld).sceneLatency},
}

func swarmCommand(o *options) *cobra.Command {
	s := &swarmOptions{options: o}
	cmd := &cobra.Command{
		Use:   "swarm",
		Short: "Many real nodes in network namespaces: what they send each other, and what happens when some die",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return benchSwarm(cmd.Context(), s) },
	}
	cmd.Flags().IntVar(&s.nodes, "nodes", 32, "how many nodes, half of them in each of two zones")
	cmd.Flags().IntVar(&s.mbit, "mbit", 5, "each node's link where all take part, Mbit/s; ten times that where few do; a supernode's is ten times a node's")
	cmd.Flags().StringVar(&s.image, "image", "redis", "the image that all nodes get, of those with an upgrade")
	cmd.Flags().StringSliceVar(&s.scenes, "scenes", nil, "only these: few, registry, all, supernode-killed, restart, hang, burst, beside, parent-killed, changes, latency")
	return cmd
}

func benchSwarm(ctx context.Context, o *swarmOptions) (err error) {
	if o.nodes < 16 {
		return fmt.Errorf("--nodes %d: the scenes need 16 at least", o.nodes)
	}
	images := []string{o.image, "python-django"}
	if len(o.scenes) == 0 || slices.Contains(o.scenes, "burst") {
		images = append(images, "torch") // takes long to build
	}
	w, err := newSwarmWorld(ctx, o, images...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	began, err := readProcessorTime()
	if err != nil {
		return err
	}
	var r report.Report
	for _, s := range swarmScenes {
		if len(o.scenes) > 0 && !slices.Contains(o.scenes, s.name) {
			continue
		}
		say("scene %s", s.name)
		if err := s.run(w, ctx, &r); err != nil {
			return fmt.Errorf("scene %s: %w", s.name, err)
		}
	}
	if err := began.noteStolen(&r); err != nil {
		return err
	}
	if err := r.Print(os.Stdout); err != nil {
		return err
	}
	if len(o.scenes) > 0 {
		if err := r.Keep(o.out, "swarm"); err != nil {
			return err
		}
	}
	return r.Save(o.out, "swarm")
}

// alone has nodes share nothing: every byte comes from the supernode.
const alone = "listen = []\n"

// sceneFew compares few nodes that share with as many that do not.
func (w *swarmWorld) sceneFew(ctx context.Context, r *report.Report) error {
	s, err := w.supernode(ctx, w.o.fewRate())
	if err != nil {
		return err
	}
	if err := w.warm(ctx, s, w.o.image, "v1"); err != nil {
		return err
	}
	im, err := w.image(ctx, "v1")
	if err != nil {
		return err
	}
	names := []string{"one node alone", "two nodes", "three nodes"}
	ratios := make([][]float64, len(names))
	for range w.o.runs {
		for k := range names {
			var slowest [2]time.Duration
			for i, extra := range []string{alone, ""} {
				nodes, err := w.nodesOn(ctx, w.few[:k+1], s.Address, extra)
				if err == nil {
					var p pulled
					p, err = w.prefetchAll(ctx, nodes, im)
					slowest[i] = slices.Max(p.took)
				}
				if err == nil && extra == "" {
					err = w.sources(ctx, nodes)
				}
				if err := errors.Join(err, w.stopNodes(nodes)); err != nil {
					return err
				}
			}
			say("%s: %.2f s direct from the supernode, %.2f s in a group", names[k], slowest[0].Seconds(), slowest[1].Seconds())
			ratios[k] = append(ratios[k], slowest[1].Seconds()/slowest[0].Seconds())
		}
	}
	for k, name := range names {
		r.Add("whole image, "+name+", against direct from the supernode", "x", report.AtMost, 1.05, ratios[k]...)
	}
	return s.Stop()
}

// registryCost is what bringing an image to some nodes at once costs the registry,
// with a supernode that has nothing yet.
func (w *swarmWorld) registryCost(ctx context.Context, hosts []*lab.Host, im *lab.Image) (bytes, requests int64, err error) {
	s, err := w.supernode(ctx, w.o.nodeRate())
	if err != nil {
		return 0, 0, err
	}
	nodes, err := w.nodesOn(ctx, hosts, s.Address, "")
	if err != nil {
		return 0, 0, errors.Join(err, w.stopNodes(nodes))
	}
	_, sent, err := w.upstream.Bytes()
	if err != nil {
		return 0, 0, err
	}
	before, err := w.registry.Requests(ctx)
	if err != nil {
		return 0, 0, err
	}
	if _, err := w.prefetchAll(ctx, nodes, im); err != nil {
		return 0, 0, err
	}
	if err := w.proven(ctx, nodes, im); err != nil {
		return 0, 0, err
	}
	_, after, err := w.upstream.Bytes()
	if err != nil {
		return 0, 0, err
	}
	requests, err = w.registry.Requests(ctx)
	return after - sent, requests - before, errors.Join(err, w.stopNodes(nodes), s.Stop())
}

// sceneRegistry has every node pull an image that the supernode does not have.
func (w *swarmWorld) sceneRegistry(ctx context.Context, r *report.Report) error {
	im, err := w.image(ctx, "v1")
	if err != nil {
		return err
	}
	one, oneAsks, err := w.registryCost(ctx, w.hosts[:1], im)
	if err != nil {
		return err
	}
	many, manyAsks, err := w.registryCost(ctx, w.hosts, im)
	if err != nil {
		return err
	}
	say("registry: %d bytes in %d requests for one node, %d bytes in %d requests for %d; the image has %d", one, oneAsks, many, manyAsks, len(w.hosts), im.Compressed())
	// Bytes are counted on the wire: less what TCP, IP and HTTP add to one node's.
	r.Add(fmt.Sprintf("registry bytes, %d real nodes at once, against those for one", len(w.hosts)), "x", report.AtMost, 1.00, round2(float64(many)/float64(one)))
	r.Add(fmt.Sprintf("registry requests, %d real nodes at once, more than for one", len(w.hosts)), "", report.AtMost, 0, float64(manyAsks-oneAsks))
	return nil
}

// sceneAll has every node pull the whole image at once.
func (w *swarmWorld) sceneAll(ctx context.Context, r *report.Report) error {
	s, err := w.supernode(ctx, w.o.nodeRate())
	if err != nil {
		return err
	}
	if err := w.warm(ctx, s, w.o.image, "v1"); err != nil {
		return err
	}
	im, err := w.image(ctx, "v1")
	if err != nil {
		return err
	}
	size, err := w.wireSize(ctx, s, im)
	if err != nil {
		return err
	}
	ideal := float64(size) / float64(w.o.nodeRate())
	var p50, p99, egress, cross, rss, busy []float64
	for range w.o.runs {
		nodes, err := w.nodesOn(ctx, w.hosts, s.Address, "")
		if err != nil {
			return errors.Join(err, w.stopNodes(nodes))
		}
		_, sent, err := s.host.Bytes()
		if err != nil {
			return err
		}
		into, out, err := w.net.Crossed(1)
		if err != nil {
			return err
		}
		received := make(map[*lab.Host]int64, len(nodes))
		for _, n := range nodes {
			if received[n.host], _, err = n.host.Bytes(); err != nil {
				return err
			}
		}
		p, err := w.prefetchAll(ctx, nodes, im)
		if err != nil {
			return err
		}
		if err := w.proven(ctx, nodes, im); err != nil {
			return err
		}
		_, sentAfter, err := s.host.Bytes()
		if err != nil {
			return err
		}
		intoAfter, outAfter, err := w.net.Crossed(1)
		if err != nil {
			return err
		}
		var most int64
		var got []float64
		for _, n := range nodes {
			_, peak, err := n.RSS()
			if err != nil {
				return err
			}
			most = max(most, peak)
			rx, _, err := n.host.Bytes()
			if err != nil {
				return err
			}
			got = append(got, float64(rx-received[n.host])/float64(size))
		}
		secs := seconds(p.took)
		p50 = append(p50, quantile(secs, 0.5)/ideal)
		p99 = append(p99, quantile(secs, 0.99)/ideal)
		egress = append(egress, float64(sentAfter-sent)/float64(size))
		cross = append(cross, float64(max(intoAfter-into, outAfter-out))/float64(size))
		rss = append(rss, float64(most)/(1<<20))
		busy = append(busy, 100*p.busy)
		say("all %d nodes: p50 %.1f s, p99 %.1f s, ideal %.1f s; supernode sent %.2f images, %.2f crossed zones, a node received %.2f (at most %.2f); most memory %d MiB; processors %.0f %% busy",
			len(nodes), quantile(secs, 0.5), quantile(secs, 0.99), ideal, egress[len(egress)-1], cross[len(cross)-1], quantile(got, 0.5), quantile(got, 1), most>>20, 100*p.busy)
		if err := w.sources(ctx, nodes); err != nil {
			return err
		}
		if err := w.stopNodes(nodes); err != nil {
			return err
		}
	}
	n := fmt.Sprintf("%d real nodes at once", len(w.hosts))
	r.Add("whole image on every node, "+n+", against image size / link rate, p50", "x", report.AtMost, 1.2, p50...)
	r.Add("whole image on every node, "+n+", against image size / link rate, p99", "x", report.AtMost, 1.6, p99...)
	r.Add("supernode egress, "+n+" in two zones, images", "x", report.AtMost, 2.5, egress...)
	r.Add("cross-zone bytes, "+n+", images into a zone", "x", report.AtMost, 1.1, cross...)
	r.Add("node RSS while serving and prefetching at full rate", "MiB", report.AtMost, 200, rss...)
	r.Note("processors of this machine that were busy meanwhile (more than 70 makes the times its own)", "%", busy...)
	return s.Stop()
}

// wireSize is the image's size as it goes over a link: what one node receives
// that gets all of it from the supernode.
func (w *swarmWorld) wireSize(ctx context.Context, s *swarmSupernode, im *lab.Image) (int64, error) {
	h, err := w.net.NewHost(ctx, w.name("u"), 0, 0) // without a limit: this takes no time
	if err != nil {
		return 0, err
	}
	nodes, err := w.nodesOn(ctx, []*lab.Host{h}, s.Address, alone)
	if err != nil {
		return 0, errors.Join(err, w.stopNodes(nodes))
	}
	before, _, err := nodes[0].host.Bytes()
	if err != nil {
		return 0, err
	}
	if _, err := w.prefetchAll(ctx, nodes, im); err != nil {
		return 0, err
	}
	if err := w.proven(ctx, nodes, im); err != nil {
		return 0, err
	}
	after, _, err := nodes[0].host.Bytes()
	return after - before, errors.Join(err, w.stopNodes(nodes))
}

func seconds(ds []time.Duration) []float64 {
	s := make([]float64, 0, len(ds))
	for _, d := range ds {
		s = append(s, d.Seconds())
	}
	return s
}

// quantile is the smallest sample that a share q of them does not exceed.
func quantile(samples []float64, q float64) float64 {
	s := slices.Clone(samples)
	slices.Sort(s)
	i := int(q * float64(len(s)))
	return s[min(i, len(s)-1)]
}

// round2 keeps two digits after the point: HTTP headers are not a second image.
func round2(x float64) float64 { return float64(int64(x*100+0.5)) / 100 }
