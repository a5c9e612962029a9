package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/bench/report"
)

// warmBars are the bars of pull + READY against overlayfs, supernode warm.
var warmBars = map[string]float64{
	"torch": 0.20, "python-django": 0.25, "node-express": 0.25, "debian": 0.20, "nginx": 0.20, "redis": 0.20,
}

func startCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "start",
		Short: "Pull and start of the real images against overlayfs",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return benchStart(cmd.Context(), o) },
	}
}

// startFigures are the samples of one image, a sample a run.
type startFigures struct {
	overlay, cold, warm []float64 // seconds of pull + READY
	pullOver            []float64 // seconds of a pull over what manifest and config cost
	pullBytes           []float64 // bytes that reached the node during the pull
}

func (f *startFigures) ratios(part []float64) []float64 {
	r := make([]float64, len(part))
	for i := range part {
		r[i] = part[i] / f.overlay[i]
	}
	return r
}

func benchStart(ctx context.Context, o *options) (err error) {
	w, err := newWorld(ctx, o, "public")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	figures := map[string]*startFigures{}
	for run := range o.runs {
		for _, image := range allImages {
			if !o.wanted(image) {
				continue
			}
			if figures[image] == nil {
				figures[image] = &startFigures{}
			}
			if err := w.measureStart(ctx, image, figures[image]); err != nil {
				return fmt.Errorf("%s, run %d: %w", image, run+1, err)
			}
		}
	}
	var r report.Report
	if f := figures["torch"]; f != nil {
		m, err := w.manifest(ctx, "torch", "v1")
		if err != nil {
			return err
		}
		var share []float64
		for _, b := range f.pullBytes {
			share = append(share, 100*b/float64(m.compressed()))
		}
		r.Add("metadata that reaches the node before start, of the compressed image: torch", "%", report.AtMost, 0.5, share...)
	}
	for _, image := range allImages {
		if f := figures[image]; f != nil {
			r.Add("pull over manifest and config, supernode has the index: "+image, "s", report.AtMost, 0.3, f.pullOver...)
		}
	}
	for _, image := range allImages {
		if f := figures[image]; f != nil && warmBars[image] > 0 {
			r.Add("supernode warm, pull + READY against overlayfs: "+image, "x", report.AtMost, warmBars[image], f.ratios(f.warm)...)
		}
	}
	for _, image := range allImages {
		if f := figures[image]; f != nil {
			r.Add("supernode cold, pull + READY against overlayfs: "+image, "x", report.AtMost, 0.7, f.ratios(f.cold)...)
		}
	}
	if o.wanted("python-django") {
		var shares []float64
		for range o.runs {
			x, err := w.measureTwoNodes(ctx, "python-django")
			if err != nil {
				return err
			}
			shares = append(shares, x)
		}
		r.Add("registry bytes, two nodes at once, cold supernode: python-django", "x", report.AtMost, 1, shares...)
	}
	if err := r.Print(os.Stdout); err != nil {
		return err
	}
	return r.Save(o.out, "start")
}

// measureStart takes one sample of everything about one image: overlayfs, shoal
// with a cold and then with a warm supernode, each on a fresh machine.
func (w *world) measureStart(ctx context.Context, image string, f *startFigures) error {
	ref := w.ref(image, "v1")
	plain, err := w.plain(ctx)
	if err != nil {
		return err
	}
	over, err := plain.pullAndRun(ctx, "overlayfs", ref, false)
	if err := errors.Join(err, plain.stop()); err != nil {
		return err
	}
	super, err := w.StartSupernode(ctx, w.name("s"), "")
	if err != nil {
		return err
	}
	first, err := w.lazy(ctx, super)
	if err != nil {
		return err
	}
	cold, err := first.pullAndRun(ctx, "shoal", ref, false)
	if err := errors.Join(err, first.stop()); err != nil {
		return err
	}
	if err := super.Settle(ctx, 5*time.Minute); err != nil {
		return err
	}
	second, err := w.lazy(ctx, super)
	if err != nil {
		return err
	}
	registryBefore := w.link.Down()
	nodeBefore := second.link.Down()
	began := time.Now()
	if err := second.Pull(ctx, "shoal", ref); err != nil {
		return err
	}
	pulled := time.Since(began)
	pullBytes := second.link.Down() - nodeBefore
	if n := w.link.Down() - registryBefore; n > 1<<20 {
		return fmt.Errorf("the pull with a warm supernode fetched %d bytes from the registry: layers were not lazy", n)
	}
	// After the pull, so that what the supernode had to ask the registry counts as
	// the pull's.
	metadata, _, err := w.measureMetadata(ctx, image, second.node.Mirror)
	if err != nil {
		return err
	}
	ready, err := second.RunReady(ctx, "shoal", ref, false)
	if err := errors.Join(err, second.stop(), super.Stop()); err != nil {
		return err
	}
	warm := pulled + ready
	say("%-14s overlayfs %.2f s, shoal cold %.2f s (%.2fx), warm %.2f s (%.2fx), pull %.2f s (manifest and config alone %.2f s), %.2f MB",
		image, over.ready.Seconds(), cold.ready.Seconds(), cold.ready.Seconds()/over.ready.Seconds(),
		warm.Seconds(), warm.Seconds()/over.ready.Seconds(), pulled.Seconds(), metadata.Seconds(), float64(pullBytes)/1e6)
	f.overlay = append(f.overlay, over.ready.Seconds())
	f.cold = append(f.cold, cold.ready.Seconds())
	f.warm = append(f.warm, warm.Seconds())
	f.pullOver = append(f.pullOver, (pulled - metadata).Seconds())
	f.pullBytes = append(f.pullBytes, float64(pullBytes))
	return nil
}

// measureMetadata asks for what every pull asks for, the manifest by its tag and by
// its digest, and the config, on a connection of its own: a node's mirror, or with
// an empty address the registry by way of the link. It returns how long that took
// and the bytes that came over the registry's link.
func (w *world) measureMetadata(ctx context.Context, image, mirror string) (time.Duration, int64, error) {
	man, err := w.manifest(ctx, image, "v1")
	if err != nil {
		return 0, 0, err
	}
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	base, query := "http://"+w.link.Addr+"/v2/"+image, ""
	if mirror != "" {
		base, query = "http://"+mirror+"/v2/"+image, "?ns="+w.link.Addr
	}
	before := w.link.Down()
	began := time.Now()
	for _, ask := range []struct{ method, path string }{
		{http.MethodHead, "/manifests/v1"},
		{http.MethodGet, "/manifests/v1"},
		{http.MethodGet, "/blobs/" + man.Config.Digest},
	} {
		req, err := http.NewRequestWithContext(ctx, ask.method, base+ask.path+query, nil)
		if err != nil {
			return 0, 0, err
		}
		req.Header.Set("Accept", manifestTypes)
		resp, err := client.Do(req)
		if err != nil {
			return 0, 0, err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			return 0, 0, err
		}
		if resp.StatusCode != http.StatusOK {
			return 0, 0, fmt.Errorf("%s %s: %s", ask.method, ask.path, resp.Status)
		}
	}
	return time.Since(began), w.link.Down() - before, nil
}

// measureTwoNodes pulls one image on two machines at once with a cold supernode
// and returns the bytes that came from the registry, less manifest and config,
// which are fetched once as well, over the compressed size.
func (w *world) measureTwoNodes(ctx context.Context, image string) (float64, error) {
	ref := w.ref(image, "v1")
	man, err := w.manifest(ctx, image, "v1")
	if err != nil {
		return 0, err
	}
	_, metadata, err := w.measureMetadata(ctx, image, "")
	if err != nil {
		return 0, err
	}
	super, err := w.StartSupernode(ctx, w.name("s"), "")
	if err != nil {
		return 0, err
	}
	var machines [2]*machine
	for i := range machines {
		if machines[i], err = w.lazy(ctx, super); err != nil {
			return 0, err
		}
	}
	before := w.link.Down()
	var both sync.WaitGroup
	var errs [2]error
	for i, m := range machines {
		both.Go(func() { _, errs[i] = m.pullAndRun(ctx, "shoal", ref, false) })
	}
	both.Wait()
	got := w.link.Down() - before - metadata
	err = errors.Join(errs[0], errs[1], machines[0].stop(), machines[1].stop(), super.Stop())
	x := float64(got) / float64(man.compressed())
	say("two nodes at once: %d bytes from the registry, the image has %d: %s", got, man.compressed(), strings.TrimSpace(fmt.Sprintf("%.4fx", x)))
	// The bar has two digits: HTTP headers are not a second image.
	return math.Round(x*100) / 100, err
}
