package main

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/integration/report"
)

func ingestCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "ingest",
		Short: "Ingest of the biggest image, registry on loopback, against containerd's overlayfs pull of it",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return benchIngest(cmd.Context(), o) },
	}
}

func benchIngest(ctx context.Context, o *options) (err error) {
	w, err := newWorld(ctx, o, bigFileImage)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	ref := w.registry.Addr + "/" + bigFileImage + ":v1"
	start, err := readProcessorTime()
	if err != nil {
		return err
	}
	var ratios, rss []float64
	for range o.runs {
		m, err := w.plain(ctx)
		if err != nil {
			return err
		}
		began := time.Now()
		err = m.Pull(ctx, "overlayfs", ref)
		overlay := time.Since(began)
		if err := errors.Join(err, m.stop()); err != nil {
			return err
		}
		super, err := w.StartSupernode(ctx, w.name("s"), "")
		if err != nil {
			return err
		}
		began = time.Now()
		_, err = w.Run(ctx, "shoal", "prefetch", "--control", super.Control, ref)
		ingest := time.Since(began)
		if err != nil {
			return err
		}
		_, peak, err := super.RSS()
		if err := errors.Join(err, super.Stop()); err != nil {
			return err
		}
		say("overlayfs pull %.2f s, ingest %.2f s, supernode at most %d MiB", overlay.Seconds(), ingest.Seconds(), peak>>20)
		ratios = append(ratios, ingest.Seconds()/overlay.Seconds())
		rss = append(rss, float64(peak)/(1<<20))
	}
	var r report.Report
	r.Add("ingest of torch, 2 cores, registry on loopback, against containerd's overlayfs pull", "x", report.AtMost, 1, ratios...)
	r.Add("supernode RSS while ingesting torch", "MiB", report.AtMost, 300, rss...)
	if err := start.noteStolen(&r); err != nil {
		return err
	}
	if err := r.Print(os.Stdout); err != nil {
		return err
	}
	return r.Save(o.out, "ingest")
}
