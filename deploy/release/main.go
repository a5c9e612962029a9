// Command release makes what users of shoal install, from a commit: the programs,
// the container image, the chart, the archives, the packages, and what says what is in
// them.
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
	"time"

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

	build := func(cmd *cobra.Command) (*source, []built, error) {
		src, err := readSource(cmd.Context(), version)
		if err != nil {
			return nil, nil, err
		}
		programs, err := buildAll(cmd.Context(), src, src.in(dist), platforms)
		return src, programs, err
	}
	root.AddCommand(&cobra.Command{
		Use:   "image",
		Short: "Write shoal-image.tar: the container image, an OCI layout in a tar",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			src, programs, err := build(cmd)
			if err != nil {
				return err
			}
			return writeImage(src.in(dist, imageFile), src, programs)
		},
	})
	var snapshot bool
	all := &cobra.Command{
		Use:   "all",
		Short: "Write archives, packages, SBOMs, the image, the chart and checksums to release/",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			src, err := readSource(cmd.Context(), version)
			if err != nil {
				return err
			}
			if !snapshot {
				if err := checkRelease(cmd.Context(), src); err != nil {
					return err
				}
			}
			_, programs, err := build(cmd)
			if err != nil {
				return err
			}
			return writeRelease(cmd.Context(), src.in(dist, "release"), src, programs)
		},
	}
	all.Flags().BoolVar(&snapshot, "snapshot", false, "take any commit, and a working tree that differs from it")
	root.AddCommand(all, &cobra.Command{
		Use:   "changelog",
		Short: "Move the fragments in changelog/unreleased to CHANGELOG.md, for the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			src, err := readSource(cmd.Context(), version)
			if err != nil {
				return err
			}
			return moveChangelog(src.Root, src.Version, time.Now())
		},
	})
	return root
}
