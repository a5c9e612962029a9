// Package members is a node's side of membership: it joins each supernode with a
// token, keeps the leases alive, and knows the members of the groups that this
// node is in. The supernode's side is p2p/roster; docs/formats.md,
// "/shoal/member/1", describes what is said.
//
// # Terms
//
//   - member: a node that a supernode has let in. It is one for as long as its
//     stream is there, and for one lease after that.
//   - lease: a duration of some seconds. No clock is ever compared with another
//     machine's.
//   - group: the nodes that have one image's indexes now, named by the image's
//     manifest digest. A node joins when it gets the indexes and leaves when the
//     image is removed.
//   - grant: what a supernode gives out with the indexes, and what it wants to
//     see of nodes that join the image's group. It is bound to the node's identity.
//   - home: the supernode that keeps a group: the first that this node has
//     joined, in rendezvous order of the manifest digest.
//   - view: what this node knows of a group: all members of its own cell, a few
//     (gateways) of each other cell. See package route.
//   - stranger: a peer that has connected and is in no group of this node, as far
//     as this node knows. Its streams wait until a supernode has said whether it is a member.
//
// The Example of package roster shows both ends. Groups and View say which peers to ask for chunks
// of a diff, Addrs where to dial the peer that route has chosen, and Allowed whether a peer
// may ask this node.
//
// # Invariants
//
//   - Only members of a group that this node is in, and supernodes, get a stream
//     to a handler of this node's host, and only those are dialed.
//   - A peer that is not a member any more is disconnected within a few seconds of the
//     supernode's word. A node that no supernode answers keeps its views for
//     Config.Outage, and has none after that.
//   - A node that is refused has no views: it is not a member itself.
//   - What a supernode sends is bounded and checked; an update that does not fit
//     what this node has is not applied, and all of the group is asked for again.
//   - No lock is held across I/O.
package members
