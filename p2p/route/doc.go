// Package route decides which peer a node asks for a chunk. It is pure: members, a
// chunk and what became of earlier requests go in, a peer to ask comes out. It
// does no I/O, has no clock (time comes in as values) and starts no goroutine,
// so that the daemon and the simulator (bench/cmd/sim) use the very same code.
// docs/distribution.md explains the idea without prior knowledge.
//
// # Terms
//
//   - group: the nodes that hold one image's index now, and so may share its
//     chunks; named by the image's manifest digest.
//   - cell: a part of a group, of a few hundred members at most, within one
//     zone. A node knows its own cell in full, and of every other cell a few
//     members, its gateways.
//   - view: what the supernode has sent a node about a group. Views of different
//     nodes may differ, at any time and in any way.
//   - rank: a 64-bit hash of a chunk and a member (or cell, or zone). The one of
//     the highest rank comes first: rendezvous hashing. Everybody computes the
//     same rank, for all other contents of their views.
//   - tree: the members of a cell in order of rank, read as a heap in which each
//     position has Fanout children: position i asks position (i-1)/Fanout, its
//     parent. Each chunk has a tree of its own, so each member is an inner node
//     for one chunk in Fanout and a leaf for the others.
//   - root: position 0 of a tree. A cell's root asks another cell, in the same
//     way: the cells of the zone, in order of rank, are a heap, and a gateway
//     of the parent cell is asked. The root of the zone's first cell asks
//     another zone, in the same way again, and the root of all asks the
//     supernode.
//   - elder: a member of the cell that has the whole image (Member.Full), or else
//     the next one below the root. A root asks there, with MaxHops, before it asks
//     outside of the cell, so that a node that comes late does not get from the
//     supernode what its neighbours have.
//   - alternates: other members above a node in the tree that are asked when the
//     parent is busy, dead or slow.
//   - out: a peer that failed is left out of all trees for a while (ejected).
//
// # How it is used
//
// The Example looks for a chunk.
//
// Batches: call Next for each chunk, then sort by Target.Index (-1: supernode)
// and send one request to each. Requests that are served (hops > 0) are routed
// in the same way: a parent that lacks the chunk asks its own parent, one flight
// however many ask, and passes it on. Only a request that says MaxHops is never
// forwarded: a peer that lacks the chunk says so at once (Missing).
//
// Requests to a peer that is in no view any more are given up as Dead.
//
// While a request is under way, Book.Patience says how long to wait before a
// second one is sent (hedge; for demand reads, and only if Book.Hedge grants the
// bytes) and before the first is given up (Report with Slow, then Next).
//
// Prefetch takes the chunks in the image's order, the same on every node, and keeps
// as many bytes asked for as Table.Inflight says.
//
// # Invariants
//
//   - Requests that may be forwarded go only to members that rank above the
//     node in its cell, cells that rank above its own in its zone, zones that rank
//     above its own. Rank does not depend on the view, so requests cannot go in
//     circles however much views differ. (If nodes disagree about a member's cell
//     or zone, they might; then the hop limit ends it.)
//   - Every search ends: an Ask tries at most MaxTries peers, each once, and
//     then the supernode. So under any mix of views and deaths every chunk
//     reaches every member for as long as the supernode has it.
//   - A prefetch that meets only busy peers waits and tries again: a swarm at its
//     limit does not turn to the supernode.
//   - Decisions are deterministic: the same input gives the same output, here and
//     on any other machine.
//   - Group.Next does not allocate, and takes about a microsecond in a cell of
//     256 members.
package route
