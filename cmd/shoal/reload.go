package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newReloadCommand() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Read the daemon's config file again, and show which keys have changed",
		Long: `Reload tells the running daemon to read its config file again, as SIGHUP does, and
prints which keys have changed and which of them need a restart. If the file has an
error, then nothing changes.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			done, err := controlClient(socket).Reload(cmd.Context())
			if err != nil {
				return err
			}
			for _, k := range done.Changed {
				fmt.Fprintf(cmd.OutOrStdout(), "changed: %s\n", k)
			}
			for _, k := range done.Restart {
				fmt.Fprintf(cmd.OutOrStdout(), "needs a restart: %s\n", k)
			}
			if len(done.Changed)+len(done.Restart) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing has changed")
			}
			return nil
		},
	}
	addControlFlag(cmd, &socket)
	return cmd
}
