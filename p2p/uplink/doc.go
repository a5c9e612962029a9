// Package uplink is a node's way to its supernodes: several that are one
// blockdev.Source, image.Source and image.DocumentSource.
//
// # Terms
//
//   - owner: each diff, and each image, belongs to one of the supernodes, by
//     rendezvous hash of its digest (members.Order). The others are asked, in that
//     order, when the owner is gone or does not have it.
//
// # Invariants
//
//   - A supernode that is known to be away is asked last, so that its absence costs a a
//     node no more than one timeout.
//   - What one supernode has delivered is not asked of the next one.
//   - A "no" that another supernode would say as well (no access, not supported) is
//     final.
package uplink
