package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// besideReads is how many files a container reads from, without other traffic and
// with it: enough for a 99th percentile.
const besideReads = 250

// sceneBeside has a node read an image on demand: with nothing else to do, and while it
// fetches another image and three nodes fetch a third one that it has.
func (w *swarmWorld) sceneBeside(ctx context.Context, r *report.Report) error {
	rate := 2 * w.o.fewRate()
	s, err := w.supernode(ctx, rate)
	if err != nil {
		return err
	}
	for _, im := range [][2]string{{"python-django", "v1"}, {w.o.image, "v1"}, {w.o.image, "v2"}} {
		if err := w.warm(ctx, s, im[0], im[1]); err != nil {
			return err
		}
	}
	hosts, err := w.machines(ctx, "d", 4, rate)
	if err != nil {
		return err
	}
	var ratios []float64
	for run := range w.o.runs {
		quiet, beside, err := w.beside(ctx, s, hosts, uint64(run))
		if err != nil {
			return err
		}
		a, b := quantile(quiet, 0.99), quantile(beside, 0.99)
		say("demand reads: p50 %.1f ms, p99 %.1f ms; beside prefetch and serving at full rate p50 %.1f ms, p99 %.1f ms",
			1e3*quantile(quiet, 0.5), 1e3*a, 1e3*quantile(beside, 0.5), 1e3*b)
		ratios = append(ratios, b/a)
	}
	r.Add("demand read p99 beside prefetch and serving at full rate, against idle", "x", report.AtMost, 2, ratios...)
	return s.Stop()
}

// beside returns how long reads took, in seconds, without and with other traffic.
func (w *swarmWorld) beside(ctx context.Context, s *swarmSupernode, hosts []*lab.Host, seed uint64) (quiet, beside []float64, err error) {
	nodes, err := w.nodesOn(ctx, hosts, s.Address, "")
	defer func() { err = errors.Join(err, w.stopNodes(nodes)) }()
	if err != nil {
		return nil, nil, err
	}
	im, err := w.registry.Image(ctx, "python-django", "v1")
	if err != nil {
		return nil, nil, err
	}
	has, err := w.image(ctx, "v1")
	if err != nil {
		return nil, nil, err
	}
	gets, err := w.image(ctx, "v2")
	if err != nil {
		return nil, nil, err
	}
	self := nodes[0]
	if _, err := w.prefetchAll(ctx, nodes[:1], has); err != nil {
		return nil, nil, err
	}
	dirs, unmount, err := w.mounted(ctx, nodes[:1], im)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	files, err := regularFiles(dirs[0], 4<<10)
	if err != nil {
		return nil, nil, err
	}
	rand.New(rand.NewPCG(seed, 2)).Shuffle(len(files), func(i, k int) { files[i], files[k] = files[k], files[i] })
	if len(files) < 2*besideReads {
		return nil, nil, errors.New("the image has too few files")
	}
	if quiet, err = firstBlocks(dirs[0], files[:besideReads]); err != nil {
		return nil, nil, err
	}
	errs := make([]error, len(nodes))
	var all sync.WaitGroup
	for i, n := range nodes {
		all.Go(func() {
			im := has
			if n == self {
				im = gets
			}
			errs[i] = w.prefetch(ctx, n, im)
		})
	}
	time.Sleep(time.Second) // all of them are at it
	beside, err = firstBlocks(dirs[0], files[besideReads:2*besideReads])
	all.Wait()
	return quiet, beside, errors.Join(append(errs, err)...)
}

// firstBlocks reads the first block of each file, and returns the seconds that took.
func firstBlocks(dir string, files []lab.File) (took []float64, err error) {
	for _, f := range files {
		began := time.Now()
		if _, err := readBlock(filepath.Join(dir, f.Name), 0); err != nil {
			return nil, err
		}
		took = append(took, time.Since(began).Seconds())
	}
	return took, nil
}
