package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

func demoCommand(o *options) *cobra.Command {
	var image string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run one real image through overlayfs and through shoal, and show what that saved",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return demo(cmd.Context(), o, image) },
	}
	cmd.Flags().StringVar(&image, "image", "", "an image from any registry (default: python with Django, made here)")
	return cmd
}

// demoRow is a line of the demo's table.
type demoRow struct {
	how string
	start
	before, all int64 // bytes over the link: until READY, and in all
}

func demo(ctx context.Context, o *options, image string) (err error) {
	w, repository, tag, err := demoWorld(ctx, o, image)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	ref := w.ref(repository, tag)
	// An image of ours says READY when it serves; of any other the first line of
	// output, or its end, is as much as can be known.
	anyLine := image != ""
	var rows []demoRow

	say("overlayfs: pull and run %s", ref)
	plain, err := w.plain(ctx)
	if err != nil {
		return err
	}
	before := w.link.Down()
	s, err := plain.pullAndRun(ctx, "overlayfs", ref, anyLine)
	if err := errors.Join(err, plain.stop()); err != nil {
		return err
	}
	n := w.link.Down() - before
	rows = append(rows, demoRow{"overlayfs", s, n, n})

	super, err := w.StartSupernode(ctx, w.name("s"), "")
	if err != nil {
		return err
	}
	for _, how := range []string{"shoal, first in the datacenter", "shoal, next node"} {
		say("%s: pull and run", how)
		m, err := w.lazy(ctx, super)
		if err != nil {
			return err
		}
		// The node's own link: what the registry sent is in the first line alone.
		s, err := m.pullAndRun(ctx, "shoal", ref, anyLine)
		if err != nil {
			return err
		}
		early := m.link.Down()
		if err := m.node.WaitLocal(ctx, ref, 5*time.Minute); err != nil {
			return err
		}
		rows = append(rows, demoRow{how, s, early, m.link.Down()})
		if err := errors.Join(m.stop(), super.Settle(ctx, 5*time.Minute)); err != nil {
			return err
		}
	}
	fmt.Println()
	tw := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "\ts to pulled\ts to READY\tMB to the node before READY\tMB in all\t")
	for _, r := range rows {
		fmt.Fprintf(tw, "%s\t%.2f\t%.2f\t%.1f\t%.1f\t\n", r.how, r.pulled.Seconds(), r.ready.Seconds(), float64(r.before)/1e6, float64(r.all)/1e6)
	}
	return tw.Flush()
}

// demoWorld makes the world of the demo: the image is built here, or copied
// from its registry, so that the link is the same for each way of running it.
func demoWorld(ctx context.Context, o *options, image string) (w *world, repository, tag string, err error) {
	if image == "" {
		w, err = newWorld(ctx, o, "python-django")
		return w, "python-django", "v1", err
	}
	dir, err := os.MkdirTemp("", "demo")
	if err != nil {
		return nil, "", "", err
	}
	if w, err = startWorld(ctx, o, dir); err != nil {
		return nil, "", "", errors.Join(err, os.RemoveAll(dir))
	}
	w.OnClose(func() error { return os.RemoveAll(dir) })
	say("copy %s", image)
	_, err = w.Run(ctx, "skopeo", "copy", "--dest-tls-verify=false", "docker://"+image, "docker://"+w.registry.Addr+"/demo:v1")
	if err != nil {
		return nil, "", "", errors.Join(err, w.Close())
	}
	return w, "demo", "v1", nil
}
