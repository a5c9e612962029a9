// Package supernode is the datacenter's cache of images: it turns layers into indexes and
// chunks, each once, and hands them to nodes that may have them.
//
//   - access: which peer may read what
//   - layers: how a layer gets here
//   - profiles: what containers read at their start
//   - ingest: a layer's stream -> checked, unpacked, chunked, stored
//   - store: chunks and indexes on disk, below a quota
//   - slots: places for work that may be slow
//
// This package joins them and gives the answers: images.go (indexes), documents.go
// (manifests and configs), source.go (chunks), report.go (startup profiles), stock.go (the
// operator).
//
// # Terms
//
// A peer is a node by its libp2p identity, or "" for the process that the
// supernode lives in.
//
// # Invariants
//
//   - An index is handed out only to peers that may pull the repository by the word of
//     its registry (access), and only for layers that this repository has shown to have
//     (layers).
//   - A manifest or config is handed out to peers that its own repository would give it
//     out, by the same rule.
//   - A peer that knows a chunk's SHA-256 may have the chunk: only indexes say them.
//   - All indexes of an image are handed out, or none. Those that were asked for last stay in
//     memory, once for all that ask, and may be given by nodes that have had them (relays) in
//     place of this supernode.
//   - Credentials are kept in memory only, tokens for a minute, nothing of them
//     on disk or in a log.
package supernode
