package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprint(cmd.OutOrStdout(), versionLine())
			return err
		},
	}
}

// versionLine is what `shoal version` and `shoal --version` print.
func versionLine() string {
	return fmt.Sprintf("shoal %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
