package main

import (
	"fmt"

	"github.com/spf13/cobra"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

func addKubeconfigFlag(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "kubeconfig", "", "kubeconfig file (default: the pod's service account)")
}

// newClient connects as a kubeconfig file says, or as the pod's service account. It is the
// client of one API group: those of all would be most of the program.
func newClient(kubeconfig string) (typedcorev1.CoreV1Interface, error) {
	var cfg *rest.Config
	var err error
	if kubeconfig == "" {
		cfg, err = rest.InClusterConfig()
	} else {
		cfg, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to Kubernetes: %w; outside of a pod, name a file with --kubeconfig", err)
	}
	cfg.UserAgent = "shoal-kube/" + version
	return typedcorev1.NewForConfig(cfg)
}
