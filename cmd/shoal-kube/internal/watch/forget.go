package watch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// nodesAtATime is how many nodes one answer of the API server has.
const nodesAtATime = 250

// Forget takes condition and taint off all Kubernetes nodes, when the pods that a selector
// names are gone: while they watch, they write them again. It looks at the pods every poll,
// and returns how many nodes it has changed. An error of one node does not keep it from the
// others.
func Forget(ctx context.Context, client typedcorev1.CoreV1Interface, namespace, selector string, poll time.Duration) (changed int, err error) {
	if err := gone(ctx, client.Pods(namespace), selector, poll); err != nil {
		return 0, err
	}
	names, err := nodes(ctx, client.Nodes(), func(n *corev1.Node) bool {
		return find(n) != nil || slices.ContainsFunc(n.Spec.Taints, ours)
	})
	errs := []error{err}
	for _, name := range names {
		if err := Clear(ctx, client, name); err != nil {
			errs = append(errs, err)
			continue
		}
		changed++
	}
	return changed, errors.Join(errs...)
}

// Watched returns the names of all Kubernetes nodes that have the condition: shoal was
// installed on these machines, and Forget has not run since.
func Watched(ctx context.Context, client typedcorev1.NodeInterface) ([]string, error) {
	return nodes(ctx, client, func(n *corev1.Node) bool { return find(n) != nil })
}

// nodes returns the names of nodes for which match is true; with an error, those that were
// listed before it.
func nodes(ctx context.Context, client typedcorev1.NodeInterface, match func(*corev1.Node) bool) (names []string, err error) {
	o := metav1.ListOptions{Limit: nodesAtATime}
	for {
		list, err := client.List(ctx, o)
		if err != nil {
			return names, fmt.Errorf("list nodes: %w", err)
		}
		for i := range list.Items {
			if n := &list.Items[i]; match(n) {
				names = append(names, n.Name)
			}
		}
		if o.Continue = list.Continue; o.Continue == "" {
			return names, nil
		}
	}
}

// gone waits until there are no pods of a selector.
func gone(ctx context.Context, pods typedcorev1.PodInterface, selector string, poll time.Duration) error {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		list, err := pods.List(ctx, metav1.ListOptions{LabelSelector: selector})
		if err != nil {
			return fmt.Errorf("list the pods that watch: %w", err)
		}
		if len(list.Items) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d pods still watch their nodes, such as %s: %w", len(list.Items), list.Items[0].Name, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// ours reports whether a taint is shoal's.
func ours(t corev1.Taint) bool { return t.Key == TaintKey }
