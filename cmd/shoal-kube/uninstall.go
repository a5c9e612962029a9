package main

import (
	"context"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/retire"
)

func newUninstallCommand() *cobra.Command {
	c := retire.Config{Poll: time.Second}
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take the node off all machines of the cluster, before the chart's objects are deleted",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := newClient("")
			if err != nil {
				return err
			}
			c.Pods = client.Pods(os.Getenv("POD_NAMESPACE"))
			c.Nodes = client.Nodes()
			c.Out = cmd.OutOrStdout()
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return retire.Run(ctx, c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Selector, "selector", "", "labels of the pods that have installed the node")
	f.IntVar(&c.Parallel, "parallel", 10, "how many machines are uninstalled at a time")
	f.DurationVar(&timeout, "timeout", 15*time.Minute, "how long to wait for all machines")
	return cmd
}
