// Package layers is how a layer gets into the store of a supernode: from a sibling, from
// nodes that have it, or from its registry; and how the registry shows that a repository has
// a layer that is stored already.
//
// # Terms
//
// A sibling is another supernode of the same datacenter. A layer's owner is one of them all,
// the first by rendezvous hash of its DiffID. A holder is a node that has all of an image.
//
// An origin of a layer is a repository ("host/repository") that has shown that it has the
// layer: the layer was fetched from there, or a request for the blob was answered well. An
// origin that is only a host has sent all bytes, and it is not known for which repository.
//
// # Invariants
//
//   - A layer is fetched once, however many ask at the same time, and what has been fetched
//     when they stop asking is not lost.
//   - Among siblings, a layer is fetched from the registry by its owner, or by the next one
//     that can be reached, and copied to another one. What they ask each other is never
//     passed on, so it goes in no circles.
//   - A sibling is believed. A holder is not: what it gives is put together to the tar again,
//     hashed, and indexed anew.
//   - Digests are no secret, so anybody can list anybody's layers in a manifest, and
//     registries need not look for what it lists (for foreign layers they must not). So a
//     stored layer is handed out on the word of its origins alone. What a host says counts
//     if it is trusted in the configuration, or has sent all bytes of the layer once.
//   - What cannot be had however often one tries is remembered for a while, by all that was
//     asked: what one request has been refused says nothing about another.
//   - What is stored and asked for is leased: it is not evicted for a while, unless the store
//     has nothing else; then what was asked for longest ago goes.
//   - What is slow takes no others along: places for work are counted in all and by registry,
//     and a layer that is compared with the stored one slowly gives its place to those that
//     wait, as in an ingest. How long it is has no say in that, as far as only a manifest says it.
package layers
