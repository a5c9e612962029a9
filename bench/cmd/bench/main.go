// Command bench measures shoal against overlayfs and containerd's own erofs
// snapshotter, on real images, side by side in one run. Each subcommand is a
// make target (bench-start, bench-read, ...); it writes bench/out/NAME.json and
// fails only where it could not measure.
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
	var o options
	cmd := &cobra.Command{
		Use:           "bench",
		Short:         "Measure shoal on real images",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	f := cmd.PersistentFlags()
	f.StringVar(&o.bin, "bin", "../bin", "directory of the built programs")
	f.StringVar(&o.out, "out", "out", "directory for the JSON files")
	f.IntVar(&o.runs, "runs", 3, "how often each thing is measured")
	f.StringSliceVar(&o.images, "images", nil, "measure only these images")
	cmd.AddCommand(demoCommand(&o), startCommand(&o), readCommand(&o), upgradeCommand(&o), swarmCommand(&o), ingestCommand(&o), sizingCommand(&o), treesCommand(&o), docsCommand(&o))
	err := cmd.ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}
