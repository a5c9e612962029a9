// Package roster is a supernode's side of membership: which peers may talk to it, and
// which nodes hold which image's indexes now. The node's side is p2p/members;
// docs/formats.md, "/shoal/member/1", describes what is said.
//
// # Terms
//
// Member, lease, group, grant and view are explained in p2p/members.
//
//   - token: a secret that lets a node join. The token file may have several, so
//     that they can be exchanged one after the other; it is read again when it
//     changes.
//   - session: a member's stream. A member that has lost it stays one until its
//     lease is over.
//   - cell, gateways, seat, have: see package cells, which keeps the lists.
//   - place: what a member has in a group, its seat among it.
//   - relay: a member that has been given an image's indexes and passes them on to
//     a few of its zone that ask after it.
//
// # Invariants
//
//   - A peer that has not joined may use the membership protocol and nothing
//     else, and is disconnected after joinTime.
//   - A peer whose token is not in the file any more, or that is revoked, gets no
//     new lease; a revoked peer is taken off all lists at once.
//   - A group's list goes only to nodes that have shown a grant for it.
//   - Leases are durations. Nothing here looks at a wall clock.
//   - A member that comes back within its lease, the same process, keeps its places; those
//     that it does not join again within another lease are given up.
//   - A group's changes are collected and pushed together, as differences, each
//     encoded once for a cell: when n nodes join within a moment, messages are in
//     the order of n times the length of that moment, not n times n.
//   - What is kept for a node that does not read is bounded; it gets the whole
//     list again when it does.
//   - No lock is held across I/O, nor while messages are encoded.
package roster
