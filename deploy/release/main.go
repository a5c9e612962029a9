// Command release makes what users of shoal install, from a commit: the programs,
// the container image, the archives, the packages, and what says what is in them.
//
// Two runs from one commit with one version of Go give the same bytes: each time
// stamp is the commit's, owners are root, and nothing depends on the machine. No
// engine of containers, no packaging tool and no root is needed.
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
	err := newCommand().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	var version, dist string
	var platforms []string
	root := &cobra.Command{
		Use:           "release",
		Short:         "Make the container image and the release of shoal",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&version, "version", "", "the version, as the programs print it: a tag, or what git describe says")
	flags.StringVar(&dist, "dist", "dist", "the directory to write to, from the top of the repository")
	flags.StringSliceVar(&platforms, "platforms", []string{"linux/amd64", "linux/arm64"}, "what to build for")

	root.AddCommand(&cobra.Command{
		Use:   "image",
		Short: "Write shoal-image.tar: the container image, an OCI layout in a tar",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			src, err := readSource(cmd.Context(), version)
			if err != nil {
				return err
			}
			built, err := buildAll(cmd.Context(), src, src.in(dist), platforms)
			if err != nil {
				return err
			}
			return writeImage(src.in(dist, imageFile), src, built)
		},
	})
	return root
}
