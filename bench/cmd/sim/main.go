// Command sim plays a datacenter that fetches one image: machines with links of a
// rate and a latency, in zones, that come, go and die, and p2p/route, the very
// code of the daemon, to decide who asks whom. It is deterministic: a seed gives
// the same run on any machine. For comparison it plays the same network with
// nodes that all ask the supernode, with one binary tree per image (FaaSNet), and
// with a random regular graph and rarest-first (Kraken).
//
// What is left out: TCP (each chunk has a link to itself, one after the other,
// where real transfers share it), processors and disks, the start of a container.
//
// It writes sim.json and plots (SVG) to a directory.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		stop()
		os.Exit(1)
	}
}

func command() *cobra.Command {
	o := options{}
	c := &cobra.Command{
		Use:          "sim",
		Short:        "Play an image's way through a datacenter, and compare with other designs",
		Args:         cobra.NoArgs,
		SilenceUsage: true,
		RunE:         func(cmd *cobra.Command, _ []string) error { return simulate(cmd.Context(), &o, cmd.OutOrStdout()) },
	}
	f := c.Flags()
	f.StringVar(&o.out, "out", "out", "directory for sim.json and the plots")
	f.Uint64Var(&o.seed, "seed", 1, "the first run's seed; the second one's is one higher, and so on")
	f.IntVar(&o.runs, "runs", 3, "runs of each scenario, but for the longest ones, which have one or two")
	f.StringVar(&o.only, "only", "", "only scenarios whose name contains this; writes no files")
	f.Float64Var(&o.scale, "scale", 1, "size of the swarms and of the image, as a share of what the bars are about")
	return c
}

// progress prints a line about a run that has ended.
func progress(o *options, name string, seed uint64, r result, seconds float64) {
	fmt.Fprintf(o.log, "%-46s seed %d: p50 %.3f p99 %.3f p99.9 %.3f max %.3f | supernode %.2f | upload %.2f to %.2f | cross %.2f | registry %.2f | hops %d | twice %.4f | left %d | %.1fM events, %.1f s\n",
		name, seed, quantile(r.times, .5), quantile(r.times, .99), quantile(r.times, .999), quantile(r.times, 1),
		r.egress, quantile(r.upload, 0), quantile(r.upload, 1), r.cross, r.registry, r.hops, r.duplicates, r.unfinished, float64(r.events)/1e6, seconds)
}
