package watch

import (
	rbacv1 "k8s.io/api/rbac/v1"
)

// Rule is one rule of RBAC that Watch needs, and what for.
type Rule struct {
	rbacv1.PolicyRule
	For string
}

func rule(resource, why string, verbs ...string) Rule {
	return Rule{rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{resource}, Verbs: verbs}, why}
}

// ForgetRules are those that Forget needs.
func ForgetRules() []Rule {
	return []Rule{
		rule("nodes", "which nodes have condition or taint; the taint", "get", "list", "patch"),
		rule("nodes/status", "the condition `ShoalReady`", "patch"),
		rule("pods", "whether the pods that watch are gone", "list"),
	}
}

// Rules are all of them, for a ClusterRole. RBAC cannot limit them to one node or to the
// pods of one.
func Rules() []Rule {
	return []Rule{
		rule("nodes", "the condition and the taints that are there", "get"),
		rule("nodes/status", "the condition `ShoalReady`", "patch"),
		rule("nodes", "the taint; only with `--taint`, and to take the taint away", "patch"),
		rule("pods", "which pods of the node use an image", "list"),
		rule("events", "events of these pods", "create", "patch"),
	}
}
