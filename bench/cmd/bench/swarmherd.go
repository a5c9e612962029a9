package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// herdWindow is how long reads and requests are counted when something happens to a
// supernode.
const herdWindow = 10 * time.Second

// onDemand has nodes fetch nothing but what is read.
const onDemand = "prefetch = \"none\"\n"

// readers read at random, through mounts of an image whose bytes are elsewhere.
type readers struct {
	stop func()
	all  sync.WaitGroup

	mu     sync.Mutex
	took   []float64 // seconds, of each read that has ended
	failed int
}

// startReaders has some readers of each mount begin.
func startReaders(ctx context.Context, dirs []string, files []lab.File, each int) *readers {
	x := &readers{}
	ctx, x.stop = context.WithCancel(ctx)
	for i, dir := range dirs {
		for k := range each {
			x.all.Go(func() { x.read(ctx, dir, files, uint64(i*each+k)) })
		}
	}
	return x
}

func (x *readers) read(ctx context.Context, dir string, files []lab.File, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 2))
	for ctx.Err() == nil {
		f := files[rng.IntN(len(files))]
		began := time.Now()
		_, err := readBlock(filepath.Join(dir, f.Name), rng.Int64N(f.Size))
		took := time.Since(began).Seconds()
		x.mu.Lock()
		x.took = append(x.took, took)
		if err != nil {
			say("a read failed: %v", err)
			x.failed++
		}
		x.mu.Unlock()
	}
}

// count returns how many reads have ended.
func (x *readers) count() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.took)
}

// end stops them, and returns how long each read took from number from on, and how many
// have failed.
func (x *readers) end(from int) ([]float64, int) {
	x.stop()
	x.all.Wait()
	return x.took[from:], x.failed
}

// sceneRestart kills the only supernode while all nodes read, and starts it again at once.
func (w *swarmWorld) sceneRestart(ctx context.Context, r *report.Report) error {
	const image = "python-django"
	s, err := w.supernode(ctx, w.o.nodeRate())
	if err != nil {
		return err
	}
	if err := w.warm(ctx, s, image, "v1"); err != nil {
		return err
	}
	im, err := w.registry.Image(ctx, image, "v1")
	if err != nil {
		return err
	}
	nodes, err := w.nodesOn(ctx, w.hosts, s.Address, onDemand)
	if err != nil {
		return errors.Join(err, w.stopNodes(nodes))
	}
	dirs, unmount, err := w.mounted(ctx, nodes, im)
	if err != nil {
		return errors.Join(err, w.stopNodes(nodes))
	}
	files, err := regularFiles(dirs[0], 4<<10)
	if err != nil {
		return err
	}
	x := startReaders(ctx, dirs, files, 1)
	time.Sleep(3 * time.Second)
	before, err := w.registry.Requests(ctx)
	if err != nil {
		return err
	}
	began, from := time.Now(), x.count()
	if err := s.Kill(); err != nil {
		return err
	}
	again, err := w.At(s.host).RestartSupernode(ctx, s.Supernode)
	if err != nil {
		return err
	}
	away := time.Since(began)
	time.Sleep(herdWindow - away)
	after, err := w.registry.Requests(ctx)
	if err != nil {
		return err
	}
	took, failed := x.end(from)
	if len(took) < len(nodes) {
		return fmt.Errorf("%d reads of %d nodes: nothing was measured", len(took), len(nodes))
	}
	say("supernode killed and back after %.2f s: %d reads of %d nodes in %s, %d failed, the longest %.2f s; the registry had %d requests",
		away.Seconds(), len(took), len(nodes), herdWindow, failed, quantile(took, 1), after-before)
	n := fmt.Sprintf("supernode killed and restarted, %d real nodes reading", len(nodes))
	r.Add(n+": registry requests in the 10 s after it", "", report.AtMost, 0, float64(after-before))
	r.Add(n+": failed reads", "", report.AtMost, 0, float64(failed))
	r.Note(n+": longest read", "s", quantile(took, 1))
	return errors.Join(unmount(), w.stopNodes(nodes), again.Stop())
}

// sceneHang stops (SIGSTOP) one of two supernodes, and then the other, while nodes that
// share nothing read. Each is the owner of some layers.
func (w *swarmWorld) sceneHang(ctx context.Context, r *report.Report) error {
	const image = "python-django"
	h, err := w.net.NewHost(ctx, w.name("s"), 0, supernodeRate(w.o.fewRate()))
	if err != nil {
		return err
	}
	supers, err := w.At(h).StartSupernodes(ctx, w.name("pair")+"-", 2, fmt.Sprintf("\n[registry]\nconfig_path = %q\n", w.certs()))
	if err != nil {
		return err
	}
	im, err := w.registry.Image(ctx, image, "v1")
	if err != nil {
		return err
	}
	for _, s := range supers { // each copies what it does not have from the other
		if err := w.warm(ctx, &swarmSupernode{s, h}, image, "v1"); err != nil {
			return err
		}
	}
	if err := lab.WaitFor(ctx, "all layers on both supernodes", 5*time.Minute, func() error {
		for _, s := range supers {
			n, err := s.Metric(ctx, "shoal_supernode_store_layers")
			if err == nil && int(n) < len(im.Layers) {
				err = fmt.Errorf("%s has %.0f of %d", s.Name, n, len(im.Layers))
			}
			if err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	nodes, err := w.nodesOn(ctx, w.few[:4], supers[0].Address+","+supers[1].Address, alone+onDemand)
	if err != nil {
		return errors.Join(err, w.stopNodes(nodes))
	}
	dirs, unmount, err := w.mounted(ctx, nodes, im)
	if err != nil {
		return errors.Join(err, w.stopNodes(nodes))
	}
	files, err := regularFiles(dirs[0], 4<<10)
	if err != nil {
		return err
	}
	var p99, longest []float64
	var asked int64
	failed := 0
	for _, s := range supers {
		x := startReaders(ctx, dirs, files, 2)
		time.Sleep(time.Second)
		before, err := w.registry.Requests(ctx)
		if err != nil {
			return err
		}
		from := x.count()
		if err := syscall.Kill(s.Pid(), syscall.SIGSTOP); err != nil {
			return err
		}
		time.Sleep(herdWindow)
		took, bad := x.end(from)
		if err := syscall.Kill(s.Pid(), syscall.SIGCONT); err != nil {
			return err
		}
		after, err := w.registry.Requests(ctx)
		if err != nil {
			return err
		}
		if len(took) < 100 {
			return fmt.Errorf("%d reads: nothing was measured", len(took))
		}
		say("%s hangs: %d reads, %d failed, p50 %.1f ms, p99 %.1f ms, longest %.2f s; the registry had %d requests",
			s.Name, len(took), bad, 1e3*quantile(took, 0.5), 1e3*quantile(took, 0.99), quantile(took, 1), after-before)
		p99, longest = append(p99, quantile(took, 0.99)), append(longest, quantile(took, 1))
		asked += after - before
		failed += bad
		time.Sleep(2 * herdWindow) // until it is asked again, and well
	}
	r.Add("one of two supernodes hangs: demand read p99", "s", report.AtMost, 2, p99...)
	r.Note("one of two supernodes hangs: longest demand read", "s", longest...)
	r.Add("one of two supernodes hangs: registry requests", "", report.AtMost, 0, float64(asked))
	r.Add("one of two supernodes hangs: failed reads", "", report.AtMost, 0, float64(failed))
	return errors.Join(unmount(), w.stopNodes(nodes), supers[0].Stop(), supers[1].Stop())
}
