package watch

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/util/retry"
)

const (
	// Condition is the type of the node's condition.
	Condition corev1.NodeConditionType = "ShoalReady"
	// TaintKey is the taint of a node on which pods cannot start, with effect NoSchedule.
	TaintKey = "shoal.dev/not-ready"
)

// object is the Kubernetes node of this machine.
type object struct {
	client typedcorev1.CoreV1Interface
	name   string
	// condition is what was written last; nil: nothing yet.
	condition *corev1.NodeCondition
}

// say writes a verdict as the condition.
func (o *object) say(ctx context.Context, v verdict, now time.Time) error {
	before := o.condition
	if before == nil {
		node, err := o.client.Nodes().Get(ctx, o.name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("read node %s: %w", o.name, err)
		}
		before = find(node)
	}
	c := corev1.NodeCondition{
		Type: Condition, Status: v.status, Reason: v.reason, Message: v.message,
		LastHeartbeatTime: metav1.NewTime(now), LastTransitionTime: metav1.NewTime(now),
	}
	if before != nil && before.Status == c.Status {
		c.LastTransitionTime = before.LastTransitionTime
	}
	if err := o.patch(ctx, c); err != nil {
		return err
	}
	o.condition = &c
	return nil
}

// find returns the condition of a node; nil: it has none.
func find(n *corev1.Node) *corev1.NodeCondition {
	for i := range n.Status.Conditions {
		if n.Status.Conditions[i].Type == Condition {
			return &n.Status.Conditions[i]
		}
	}
	return nil
}

// patch merges one entry into the list of conditions, by its type.
func (o *object) patch(ctx context.Context, condition any) error {
	body, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []any{condition}}})
	if err != nil {
		return err
	}
	if _, err := o.client.Nodes().PatchStatus(ctx, o.name, body); err != nil {
		return fmt.Errorf("write condition %s of node %s: %w", Condition, o.name, err)
	}
	return nil
}

// taint has the node have the taint, or not.
func (o *object) taint(ctx context.Context, want bool) (changed bool, err error) {
	// The list of taints is replaced as a whole, and others change it, too.
	err = retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		node, err := o.client.Nodes().Get(ctx, o.name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if slices.ContainsFunc(node.Spec.Taints, ours) == want {
			changed = false
			return nil
		}
		taints := slices.DeleteFunc(slices.Clone(node.Spec.Taints), ours)
		if want {
			taints = append(taints, corev1.Taint{Key: TaintKey, Effect: corev1.TaintEffectNoSchedule})
		}
		body, err := json.Marshal(map[string]any{
			"metadata": map[string]any{"resourceVersion": node.ResourceVersion},
			"spec":     map[string]any{"taints": taints},
		})
		if err != nil {
			return err
		}
		changed = true
		_, err = o.client.Nodes().Patch(ctx, o.name, types.MergePatchType, body, metav1.PatchOptions{})
		return err
	})
	if err != nil {
		return false, fmt.Errorf("write taint %s of node %s: %w", TaintKey, o.name, err)
	}
	return changed, nil
}

// Clear takes condition and taint off a Kubernetes node, for when shoal leaves the
// machine.
func Clear(ctx context.Context, client typedcorev1.CoreV1Interface, node string) error {
	o := &object{client: client, name: node}
	if err := o.patch(ctx, map[string]any{"type": Condition, "$patch": "delete"}); err != nil {
		return err
	}
	_, err := o.taint(ctx, false)
	return err
}
