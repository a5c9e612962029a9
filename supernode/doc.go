// Package supernode is the datacenter's cache of images and the only one that
// talks to registries: it turns layers into indexes and chunks, each once, and
// hands them to nodes that may have them.
//
//   - access: who may read what
//   - profiles: what containers read at their start
//   - ingest: a layer's stream -> checked, unpacked, chunked, stored
//   - store: chunks and indexes on disk, below a quota
//
// Indexes that were asked for last stay in memory, once for all who ask, and may be
// given by nodes that have had them (relays) in place of this supernode.
//
// This package joins them and decides who gets what.
//
// # Terms
//
// A peer is a node by its libp2p identity, or "" for the process that the
// supernode lives in. A layer's origins are the registry hosts from which this
// supernode itself has fetched and hashed it.
//
// A sibling is another supernode of the same datacenter. A layer's owner is one of
// them all, the first by rendezvous hash of its DiffID.
//
// # Invariants
//
//   - Among siblings, a layer is fetched from the registry by its owner, or by the
//     next one that can be reached, and copied to another one. What they ask each
//     other is never passed on, so it goes in no circles.
//   - An index is handed out only to who may pull the repository by the word of
//     its registry (Config.AccessTTL, Config.AccessGrace), and only for layers
//     of which that registry is an origin, or is trusted in the configuration.
//   - A manifest or config is handed out to whom its own repository would hand it
//     out, by the same rule.
//   - A peer that knows a chunk's SHA-256 may have the chunk: only indexes say them.
//   - All indexes of an image are handed out, or none.
//   - A layer is fetched once, however many ask at the same time, and what has
//     been fetched when they stop asking is not lost.
//   - What is stored and asked for is not evicted for Config.Lease, unless the store
//     has nothing else: then what was asked for longest ago goes.
//   - Credentials are kept in memory only, tokens for a minute, nothing of them
//     on disk or in a log.
package supernode
