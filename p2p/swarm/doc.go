// Package swarm is how a node takes part in sharing chunks: Swarm is the
// blockdev.Source of a node that asks other nodes first, and the exchange.Provider
// that answers them.
//
// # Terms
//
//   - search: one call of Fetch. Each of its chunks has a route.Ask, which says
//     which peer to ask next.
//   - batch: the chunks of a search that go to one peer (or the supernode) in one
//     request.
//   - hedge: a second batch for chunks of a demand read whose first one is slower
//     than usual. The answer that comes first counts.
//   - relay: a node that the supernode names in place of an image's indexes, which
//     it has been given before.
//
// # Invariants
//
//   - Package route says which peer to ask; this package sends, waits and
//     reports what became of it.
//   - Every chunk ends up delivered, or with an answer of the supernode that it
//     cannot be fetched. No peer's failure reaches a reader.
//   - Deliver judges the bytes. A peer that sent wrong ones is left out of all groups for
//     a while, and the chunk comes from elsewhere.
//   - No node waits for itself. A chunk's tree has no circle, but waits do not stay
//     within one tree: so a peer's chunks are sent as they become ready and in no
//     order, a request to a peer never waits for a slot or a window, and what is
//     forwarded never waits for what this node wants.
//   - Only members of a group are asked for its chunks and answered.
//   - An index of a relay is used only if it has the SHA-256 that the supernode said,
//     and is asked for only if the image is to stay here: the asking node joins its group.
//   - What this node is asked for and lacks goes through the cache, as its own
//     reads do: one flight, checked, stored once.
//   - Connections, streams, requests under way and buffers are bounded; a demand
//     read never waits for a slot that prefetch holds.
//   - Deliver is called once at a time for a search, and holds up nothing else of
//     it: no other lock is held at the same time.
package swarm
