// Package watch tells Kubernetes how the shoal node of a machine does.
//
// It polls the node's control socket (Shoal), and writes three things: the condition
// ShoalReady of the Kubernetes node, events of pods, and a taint if that is wanted.
//
// # Invariants
//
//   - What has not changed is written once in a heartbeat, which is minutes: a cluster may
//     have 10,000 nodes. Changes are written at once, but not more than a few in a minute,
//     and an API server that fails is asked again after a time that doubles.
//   - Pods are listed when there is something to say about an image, and only those of this
//     node. No list is kept.
//   - A restart of the node that is shorter than the grace changes nothing.
//   - The taint says that pods cannot start here. It does not say that a supernode is away:
//     pods start then, and a whole cluster without its supernode must stay schedulable.
package watch
