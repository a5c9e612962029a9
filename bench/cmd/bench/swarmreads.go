package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// recordStart runs an image on a machine of its own and records what its start
// read, up to READY and what comes right after it.
func (w *swarmWorld) recordStart(ctx context.Context, s *swarmSupernode, image string) (lab.Recording, error) {
	h, err := w.net.NewHost(ctx, w.name("r"), 0, 0)
	if err != nil {
		return nil, err
	}
	nodes, err := w.nodesOn(ctx, []*lab.Host{h}, s.Address, "")
	if err != nil {
		return nil, errors.Join(err, w.stopNodes(nodes))
	}
	n, ref := nodes[0], w.ref(image, "v1")
	c, err := w.At(h).StartContainerd(ctx, w.name("c"), lab.ContainerdOptions{Shoal: n.Socket})
	if err != nil {
		return nil, err
	}
	if err := c.Pull(ctx, "shoal", ref, "--hosts-dir", w.certs()); err != nil {
		return nil, err
	}
	rec, err := n.Record(func() error {
		_, err := c.RunReady(ctx, "shoal", ref, false)
		return err
	})
	if err == nil {
		say("the start of %s: %d reads of %.1f MB", image, len(rec), float64(rec.Bytes())/1e6)
	}
	return rec, errors.Join(err, c.Stop(), w.stopNodes(nodes))
}

// mounted pulls an image on nodes and mounts it on each; the pages that an
// earlier node of the same machine read are not in the page cache, since every
// node has mounts of its own.
func (w *swarmWorld) mounted(ctx context.Context, nodes []*swarmNode, im *lab.Image) (dirs []string, unmount func() error, err error) {
	undo := make([]func() error, len(nodes))
	unmount = func() error {
		var errs []error
		for _, f := range undo {
			if f != nil {
				errs = append(errs, f())
			}
		}
		return errors.Join(errs...)
	}
	dirs = make([]string, len(nodes))
	for i := range dirs {
		dirs[i] = w.Path(w.name("v"))
	}
	errs := make([]error, len(nodes))
	var all sync.WaitGroup
	for i, n := range nodes {
		// All at once: who pulls first begins to fetch what is read at the start.
		all.Go(func() {
			if errs[i] = n.Pull(ctx, im); errs[i] == nil {
				undo[i], errs[i] = n.Mount(ctx, im, "view", dirs[i])
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, nil, errors.Join(err, unmount())
	}
	return dirs, unmount, nil
}

// replay replays a recording on nodes at once; each sample counts from the
// beginning of all.
func (w *swarmWorld) replay(ctx context.Context, s *swarmSupernode, hosts []*lab.Host, im *lab.Image, rec lab.Recording) ([]time.Duration, error) {
	nodes, err := w.nodesOn(ctx, hosts, s.Address, "")
	if err != nil {
		return nil, errors.Join(err, w.stopNodes(nodes))
	}
	dirs, unmount, err := w.mounted(ctx, nodes, im)
	if err != nil {
		return nil, errors.Join(err, w.stopNodes(nodes))
	}
	took := make([]time.Duration, len(nodes))
	errs := make([]error, len(nodes))
	var all sync.WaitGroup
	began := time.Now()
	for i := range nodes {
		all.Go(func() {
			errs[i] = rec.Replay(ctx, dirs[i])
			took[i] = time.Since(began)
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, errors.Join(err, unmount(), w.stopNodes(nodes))
	}
	return took, errors.Join(w.sources(ctx, nodes), unmount(), w.stopNodes(nodes))
}

// sceneBurst replays a recorded start on many nodes at once.
func (w *swarmWorld) sceneBurst(ctx context.Context, r *report.Report) error {
	hosts, err := w.machines(ctx, "b", fewNodes, w.o.halfRate())
	if err != nil {
		return err
	}
	for _, image := range []string{"python-django", "torch"} {
		im, err := w.registry.Image(ctx, image, "v1")
		if err != nil {
			return err
		}
		s, err := w.supernode(ctx, w.o.halfRate())
		if err != nil {
			return err
		}
		if err := w.warm(ctx, s, image, "v1"); err != nil {
			return err
		}
		rec, err := w.recordStart(ctx, s, image)
		if err != nil {
			return err
		}
		var ratios, spreads []float64
		for range w.o.runs {
			one, err := w.replay(ctx, s, hosts[:1], im, rec)
			if err != nil {
				return err
			}
			many, err := w.replay(ctx, s, hosts, im, rec)
			if err != nil {
				return err
			}
			secs := seconds(many)
			first, last := quantile(secs, 0), quantile(secs, 1)
			say("%s: the reads of a start take %.2f s on one node, %.2f to %.2f s on %d at once", image, one[0].Seconds(), first, last, fewNodes)
			ratios = append(ratios, last/one[0].Seconds())
			spreads = append(spreads, last-first)
		}
		r.Add(fmt.Sprintf("start burst, %d nodes at once against one alone: %s", fewNodes, image), "x", report.AtMost, 1.3, ratios...)
		r.Add("start burst, first to last: "+image, "s", report.AtMost, 1, spreads...)
		if err := s.Stop(); err != nil {
			return err
		}
	}
	return nil
}

// reader reads at random through a mounted image, compares what it gets with
// another copy of the image, and remembers how long each read took.
type reader struct {
	took   []float64 // seconds
	failed int       // reads that ended in an error
	wrong  int       // reads that gave other bytes than the copy has
}

const block = 64 << 10 // bytes a read asks for

// read goes on until ctx ends. files are paths below dir and below want, the copy.
func (x *reader) read(ctx context.Context, dir, want string, files []lab.File, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	for ctx.Err() == nil {
		f := files[rng.IntN(len(files))]
		off := rng.Int64N(f.Size)
		began := time.Now()
		got, err := readBlock(filepath.Join(dir, f.Name), off)
		x.took = append(x.took, time.Since(began).Seconds())
		if err != nil {
			say("a read failed: %v", err)
			x.failed++
			continue
		}
		if right, err := readBlock(filepath.Join(want, f.Name), off); err != nil || !bytes.Equal(got, right) {
			say("%s at %d: other bytes than in the copy (%v)", f.Name, off, err)
			x.wrong++
		}
	}
}

// readBlock reads from off to the block's or the file's end.
func readBlock(path string, off int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf := make([]byte, block)
	n, err := f.ReadAt(buf, off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return buf[:n], err
}

// sceneParentKilled kills nodes one after another while another one reads on
// demand what it gets from them.
func (w *swarmWorld) sceneParentKilled(ctx context.Context, r *report.Report) error {
	im, err := w.registry.Image(ctx, "python-django", "v1")
	if err != nil {
		return err
	}
	// One node reads, so links may be as fast as those of a slow datacenter.
	rate := 2 * w.o.fewRate()
	s, err := w.supernode(ctx, rate)
	if err != nil {
		return err
	}
	if err := w.warm(ctx, s, "python-django", "v1"); err != nil {
		return err
	}
	hosts, err := w.machines(ctx, "k", 8, rate)
	if err != nil {
		return err
	}
	nodes, err := w.nodesOn(ctx, hosts, s.Address, "")
	if err != nil {
		return err
	}
	victims := nodes[1 : len(nodes)-1]
	// The copy to compare with is mounted natively: it needs no daemon.
	copies := nodes[len(nodes)-1:]
	if _, err := w.prefetchAll(ctx, nodes[1:], im); err != nil {
		return err
	}
	dirs, unmount, err := w.mounted(ctx, nodes[:1], im)
	if err != nil {
		return err
	}
	want, unmountCopy, err := w.mounted(ctx, copies, im)
	if err != nil {
		return err
	}
	files, err := regularFiles(dirs[0], 4<<10)
	if err != nil {
		return err
	}
	reading, stop := context.WithCancel(ctx)
	var x reader
	done := make(chan struct{})
	go func() {
		defer close(done)
		x.read(reading, dirs[0], want[0], files, 1)
	}()
	for _, v := range victims {
		time.Sleep(time.Second)
		if err := v.Kill(); err != nil {
			stop()
			return err
		}
	}
	time.Sleep(2 * time.Second)
	stop()
	<-done
	say("parents killed: %d reads, %d failed, %d wrong, p50 %.1f ms, p99 %.1f ms, longest %.1f ms", len(x.took), x.failed, x.wrong,
		1e3*quantile(x.took, 0.5), 1e3*quantile(x.took, 0.99), 1e3*quantile(x.took, 1))
	r.Add("parents killed during demand reads: failed or wrong reads", "", report.AtMost, 0, float64(x.failed+x.wrong))
	r.Add("parents killed during demand reads: read p99", "ms", report.AtMost, 200, 1e3*quantile(x.took, 0.99))
	return errors.Join(unmount(), unmountCopy(), w.stopNodes(nodes), s.Stop())
}

// regularFiles lists the files below dir of at least this size, by path below dir.
func regularFiles(dir string, size int64) ([]lab.File, error) {
	var files []lab.File
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		st, err := d.Info()
		if err != nil || st.Size() < size {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		files = append(files, lab.File{Name: rel, Size: st.Size()})
		return err
	})
	return files, err
}
