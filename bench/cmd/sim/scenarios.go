package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/shoalfs/shoal/integration/report"
)

type options struct {
	out   string
	seed  uint64
	runs  int
	only  string
	scale float64
	log   io.Writer
}

const (
	mega = 1e6
	giga = 1e9
)

// scenario is a setup with a name, and rows of the report made of its runs.
type scenario struct {
	name string
	runs int // 0: as the options say
	make func(seed uint64) setup
	play func(setup) (result, error)
	rows func(add addRow, all []result)
}

// addRow adds one row, with a value for each run.
type addRow func(name, unit string, cmp report.Cmp, bar float64, value func(result) float64)

// everybody is the common case: all nodes at once, the image of 100 MB in chunks
// of 64 KiB, links of 1 Gbit/s, the supernode's of 10 Gbit/s.
func everybody(o *options, nodes int) setup {
	scaled := max(int(float64(nodes)*o.scale+0.5), 1)
	if nodes <= 32 {
		scaled = nodes
	}
	return setup{nodes: scaled, zones: 1, cell: 256, image: max(int(100*mega*o.scale), 4*mega), link: giga, super: 10 * giga, supers: 1}
}

// real is the network that `make swarm` builds of namespaces.
func real(o *options, nodes, zones int) setup {
	s := everybody(o, nodes)
	s.zones, s.link, s.super = zones, 100*mega, giga
	return s
}

func at(q float64) func(result) float64 {
	return func(r result) float64 { return quantile(r.times, q) }
}

func finished(nodes int) func(result) float64 {
	return func(r result) float64 { return float64(len(r.times)) / float64(nodes) }
}

func scenarios(o *options) []scenario {
	direct := map[int]float64{}
	all := []scenario{
		{name: "1,000 nodes at once", make: func(uint64) setup { return everybody(o, 1000) }, rows: func(add addRow, _ []result) {
			const what = "whole image on each of 1,000 nodes, over image size / link rate: "
			add(what+"p50", "x", report.AtMost, 1.1, at(.5))
			add(what+"p99", "x", report.AtMost, 1.5, at(.99))
			add(what+"p99.9", "x", report.AtMost, 2, at(.999))
			add("1,000 nodes: supernode egress, of the image", "x", report.AtMost, 1.05, func(r result) float64 { return r.egress })
			add("1,000 nodes: the busiest node's upload, of the image", "x", report.AtMost, 1.5, func(r result) float64 { return quantile(r.upload, 1) })
		}},
		{name: "1,000 nodes, supernode as slow as a node", runs: 1, make: func(uint64) setup {
			s := everybody(o, 1000)
			s.super = s.link
			return s
		}, rows: func(add addRow, _ []result) {
			add("1,000 nodes, supernode's link no faster than a node's: p99", "x", report.AtMost, 1.5, at(.99))
		}},
		{name: "10,000 nodes at once, 4 zones", runs: 1, make: func(uint64) setup {
			s := everybody(o, 10000)
			s.zones = 4
			return s
		}, rows: func(add addRow, _ []result) {
			add("whole image on each of 10,000 nodes in 4 zones, over image size / link rate: p50", "x", report.AtMost, 2, at(.5))
			add("whole image on each of 10,000 nodes in 4 zones, over image size / link rate: p99", "x", report.AtMost, 2, at(.99))
			add("10,000 nodes in 4 zones: bytes into a zone, of the image", "x", report.AtMost, 1.1, func(r result) float64 { return r.cross })
			add("10,000 nodes in 4 zones: supernode egress, of the image", "x", report.AtMost, 1.05, func(r result) float64 { return r.egress })
		}},
		{name: "32 nodes in two zones, 100 Mbit/s", make: func(uint64) setup { return real(o, 32, 2) }, rows: func(add addRow, _ []result) {
			add("32 nodes in two zones, 100 Mbit/s: p50", "x", report.AtMost, 1.2, at(.5))
			add("32 nodes in two zones, 100 Mbit/s: p99", "x", report.AtMost, 1.6, at(.99))
			add("32 nodes in two zones: supernode egress, of the image", "x", report.AtMost, 2.5, func(r result) float64 { return r.egress })
			add("32 nodes in two zones: bytes into a zone, of the image", "x", report.AtMost, 1.1, func(r result) float64 { return r.cross })
		}},
	}
	for n := 1; n <= 3; n++ {
		// Direct: the same nodes, each from the supernode.
		all = append(all, scenario{name: fmt.Sprintf("%d nodes, all from the supernode", n), runs: 1, make: func(uint64) setup {
			s := real(o, n, 1)
			s.parent = func(int) int { return -1 }
			s.window = 64
			return s
		}, rows: func(_ addRow, r []result) { direct[n] = quantile(r[0].times, 1) }},
			scenario{name: fmt.Sprintf("%d nodes", n), make: func(uint64) setup { return real(o, n, 1) }, rows: func(add addRow, _ []result) {
				add(fmt.Sprintf("%d nodes against direct from the supernode", n), "x", report.AtMost, 1.05, func(r result) float64 { return quantile(r.times, 1) / direct[n] })
			}})
	}
	return append(append(all, faults(o)...), baselines(o)...)
}

// faults are scenarios in which machines come late, go, or know little.
func faults(o *options) []scenario {
	all := everybody(o, 1000)
	n, half := all.nodes, time.Duration(all.ideal()/2*1e9)
	// A cold image: eight layers, ingested at 2 Gbit/s.
	layers := []float64{.35, .25, .15, .1, .06, .05, .03, .01}
	return []scenario{
		{name: "1,000 nodes, cold", runs: 1, make: func(uint64) setup {
			s := everybody(o, 1000)
			s.registry, s.layers = 2*giga, layers
			return s
		}, rows: func(add addRow, _ []result) {
			add("1,000 nodes, cold: registry bytes, of the image", "x", report.AtMost, 1, func(r result) float64 { return r.registry })
			add("1,000 nodes, cold: registry requests, per layer", "x", report.AtMost, 1, func(r result) float64 { return float64(r.requests) / float64(len(layers)) })
		}},
		{name: "1,000 nodes, cold, a supernode killed half-way", runs: 2, make: func(seed uint64) setup {
			s := everybody(o, 1000)
			s.supers, s.registry, s.layers = 2, 2*giga, layers
			s.kill = []death{{host: s.nodes + int(seed%2), at: half}}
			return s
		}, rows: func(add addRow, _ []result) {
			add("one of two supernodes killed half-way: registry bytes less the layers in flight, of the image", "x", report.AtMost, 1.05, func(r result) float64 { return r.registry - r.inFlight })
			add("one of two supernodes killed half-way: registry bytes, of the image", "x", report.AtMost, 1.05+layers[0], func(r result) float64 { return r.registry })
			add("one of two supernodes killed half-way: nodes that have everything in the end", "share", report.AtLeast, 1, finished(n))
		}},
		{name: "1,000 nodes, half of them killed half-way", runs: 1, make: func(seed uint64) setup {
			return withDeaths(everybody(o, 1000), seed, half, false)
		}, rows: func(add addRow, _ []result) {
			add("half of 1,000 nodes killed half-way: the others that have everything in the end", "share", report.AtLeast, 1, finished(n-n/2))
			add("half of 1,000 nodes killed half-way: p99 of the others", "x", report.AtMost, 3, at(.99))
		}},
		{name: "1,000 nodes, one in ten vanishes half-way", runs: 1, make: func(seed uint64) setup {
			s := withDeaths(everybody(o, 1000), seed, half, true)
			s.kill = s.kill[:s.nodes/10]
			return s
		}, rows: func(add addRow, _ []result) {
			add("a tenth of 1,000 nodes vanish without a word half-way: the others that have everything in the end", "share", report.AtLeast, 1, finished(n-n/10))
		}},
		{name: "1,000 nodes, each knows nine in ten", runs: 1, make: func(uint64) setup {
			s := everybody(o, 1000)
			s.hidden = .1
			return s
		}, rows: func(add addRow, _ []result) {
			add("1,000 nodes of which each knows nine in ten: p99", "x", report.AtMost, 1.5, at(.99))
			add("1,000 nodes of which each knows nine in ten: supernode egress, of the image", "x", report.AtMost, 2.5, func(r result) float64 { return r.egress })
		}},
		{name: "1,000 nodes within ten seconds", runs: 1, make: func(uint64) setup {
			s := everybody(o, 1000)
			s.spread = 10 * time.Second
			return s
		}, rows: func(add addRow, _ []result) {
			const what = "1,000 nodes within ten seconds, each from its own start: "
			add(what+"p50", "x", report.AtMost, 1.1, at(.5))
			add(what+"p99", "x", report.AtMost, 2.5, at(.99))
			add("1,000 nodes within ten seconds: supernode egress, of the image", "x", report.AtMost, 3, func(r result) float64 { return r.egress })
		}},
	}
}

// withDeaths kills half of the nodes.
func withDeaths(s setup, seed uint64, at time.Duration, silent bool) setup {
	r := rand.New(rand.NewPCG(seed, 3))
	for _, i := range r.Perm(s.nodes)[:s.nodes/2] {
		s.kill = append(s.kill, death{host: i, at: at, silent: silent})
	}
	return s
}

// baselines are other designs in the same network. Their bars are shoal's own: they
// are there to be compared with, and miss them.
func baselines(o *options) []scenario {
	return []scenario{
		{name: "200 nodes, all from the supernode", runs: 1, make: func(uint64) setup {
			s := everybody(o, 200)
			s.parent, s.window = func(int) int { return -1 }, 16
			return s
		}, rows: func(add addRow, _ []result) {
			add("baseline, no peers, 200 nodes: p99", "x", report.AtLeast, 1.5, at(.99))
		}},
		{name: "1,000 nodes, one binary tree (FaaSNet)", runs: 1, make: func(uint64) setup {
			s := everybody(o, 1000)
			s.parent, s.window = func(i int) int { return (i+1)/2 - 1 }, 64
			return s
		}, rows: func(add addRow, _ []result) {
			add("baseline, one binary tree per image (FaaSNet), 1,000 nodes: p50", "x", report.AtLeast, 1.1, at(.5))
			add("baseline, one binary tree per image (FaaSNet), 1,000 nodes: p99", "x", report.AtLeast, 1.5, at(.99))
		}},
		{name: "1,000 nodes, random graph (Kraken)", runs: 1, make: func(uint64) setup { return everybody(o, 1000) },
			play: func(s setup) (result, error) { return playMesh(s), nil },
			rows: func(add addRow, _ []result) {
				add("baseline, random regular graph and rarest-first (Kraken), 1,000 nodes: p50", "x", report.AtLeast, 1.1, at(.5))
				add("baseline, random regular graph and rarest-first (Kraken), 1,000 nodes: p99", "x", report.AtLeast, 1.2, at(.99))
			}},
	}
}

// simulate plays all scenarios and writes the report.
func simulate(ctx context.Context, o *options, log io.Writer) error {
	o.log = log
	var rep report.Report
	var curves []curve
	for _, sc := range scenarios(o) {
		if !strings.Contains(sc.name, o.only) {
			continue
		}
		runs := o.runs
		if sc.runs > 0 {
			runs = sc.runs
		}
		var all []result
		for i := range uint64(runs) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			s := sc.make(o.seed + i)
			s.seed = o.seed + i
			run := play
			if sc.play != nil {
				run = sc.play
			}
			begin := time.Now()
			r, err := run(s)
			if err != nil {
				return fmt.Errorf("%s: %w", sc.name, err)
			}
			progress(o, sc.name, s.seed, r, time.Since(begin).Seconds())
			all = append(all, r)
		}
		sc.rows(func(name, unit string, cmp report.Cmp, bar float64, value func(result) float64) {
			var values []float64
			for _, r := range all {
				values = append(values, value(r))
			}
			rep.Add(name, unit, cmp, bar, values...)
		}, all)
		curves = append(curves, curve{name: sc.name, result: all[0]})
	}
	if strings.Contains("lists of members", o.only) {
		if err := lists(ctx, o, &rep); err != nil {
			return err
		}
	}
	if err := rep.Print(log); err != nil {
		return err
	}
	if o.only != "" {
		return nil
	}
	if err := rep.Save(o.out, "sim"); err != nil {
		return err
	}
	return plots(o.out, curves)
}
