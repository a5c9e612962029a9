package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/watch"
)

func newForgetCommand() *cobra.Command {
	var kubeconfig, namespace, selector string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "forget",
		Short: "Take condition and taint off all nodes of the cluster, after the chart's objects were deleted",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := newClient(kubeconfig)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			n, err := watch.Forget(ctx, client, namespace, selector, time.Second)
			fmt.Fprintf(cmd.OutOrStdout(), "%d nodes: condition %s and taint %s removed\n", n, watch.Condition, watch.TaintKey)
			return err
		},
	}
	addKubeconfigFlag(cmd, &kubeconfig)
	f := cmd.Flags()
	f.StringVar(&namespace, "namespace", os.Getenv("POD_NAMESPACE"), "namespace of the pods that watch")
	f.StringVar(&selector, "selector", "app.kubernetes.io/component=node", "labels of the pods that watch; the command waits until they are gone")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait for these pods")
	return cmd
}
