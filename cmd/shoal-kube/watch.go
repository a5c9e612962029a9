package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/watch"
	"github.com/shoalfs/shoal/internal/control"
)

func newWatchCommand() *cobra.Command {
	var kubeconfig, socket string
	cfg := watch.Defaults()
	cmd := &cobra.Command{
		Use:   "watch",
		Short: "Tell Kubernetes how the shoal node on this machine does",
		Long: `Watch asks the shoal node on this machine every few seconds how it does. It keeps
the condition ShoalReady of the Kubernetes node, writes events for pods whose images
are lazy, are not lazy, or have failed, and with --taint it keeps pods off a node
whose shoal is not ready.

It needs the node's control socket, root, and the name of the Kubernetes node in
--node or NODE_NAME (fieldRef spec.nodeName).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cfg.Node == "" {
				return errors.New("the name of the Kubernetes node is missing: set --node, or NODE_NAME from the pod's field spec.nodeName")
			}
			client, err := newClient(kubeconfig)
			if err != nil {
				return err
			}
			cfg.Client, cfg.Shoal, cfg.Log = client, control.Client{Path: socket}, newLogger()
			w, err := watch.New(cfg)
			if err != nil {
				return err
			}
			return w.Run(cmd.Context())
		},
	}
	addKubeconfigFlag(cmd, &kubeconfig)
	f := cmd.Flags()
	f.StringVar(&socket, "control", "/run/shoal/control.sock", "control socket of the shoal node")
	f.StringVar(&cfg.Node, "node", os.Getenv("NODE_NAME"), "name of the Kubernetes node")
	f.DurationVar(&cfg.Heartbeat, "heartbeat", cfg.Heartbeat, "how often a condition that has not changed is written again")
	f.DurationVar(&cfg.Grace, "grace", cfg.Grace, "how long the shoal node may be away before the condition says so")
	f.BoolVar(&cfg.Taint, "taint", false, "taint the node with "+watch.TaintKey+":NoSchedule while pods cannot start through shoal")
	f.DurationVar(&cfg.TaintAfter, "taint-after", cfg.TaintAfter, "how long the shoal node may be away before the node is tainted")
	return cmd
}
