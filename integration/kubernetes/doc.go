// Package kubernetes has the tests that run on a real Kubernetes: a control plane and
// nodes in boxes (lab/cluster), half of them on shoal, half of them on overlayfs.
// They have the build tag kubernetes, since Kubernetes has to be built for them first
// (setup.sh). `make k8s` runs all of them, and `make test` those that the Makefile names.
package kubernetes
