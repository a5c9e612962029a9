// Package blockdev turns OCI layers into block images and serves them.
//
// # Terms
//
//   - diff: a layer's uncompressed tar stream, named by its DiffID, the SHA-256
//     that the image config gives for it.
//   - masked diff: the diff with every byte that is not file content set to
//     zero. It has the same length, and content lies at the same offsets, so a
//     rebuild that only touches headers (new mtimes) leaves it as it was.
//   - chunk: a content-defined range of the masked diff, named by its SHA-256.
//   - index: all that a node needs to mount a layer of which it has no data yet:
//     the EROFS metadata and the chunk table.
//   - block image: what the kernel mounts: EROFS metadata (device 0, a small
//     local file) over the masked diff (device 1, a file that FUSE serves until
//     every chunk is there, and the local file itself from then on).
//
// # Layout
//
// This package holds the terms as types and the contracts between the parts;
// each part is a child package:
//
//   - layer: tar stream -> index and chunks, and back again
//   - erofs: the EROFS metadata emitter
//   - cdc: content-defined chunking
//   - index: the index codec
//   - profile: the codec of startup profiles
//   - cache: local diffs on a node's disk, filled chunk by chunk
//   - chain: several sources, one after the other, each with its time
//   - turns: what is limited and may be held for long, shared among diffs
//   - proof: a complete diff against its DiffID and its index
//   - fusefs: the FUSE mount that shows local diffs as files
//   - mount: EROFS mounts over those files
//   - volume: a node's diffs as mounts: cache, fusefs and mount joined
//   - blockdevtest: the conformance suite of Source, and stand-ins for tests
//   - background: work that has only the processor time that no other work wants
//
// # Invariants
//
//   - An index is a function of the diff and the builder's version alone: same diff,
//     same bytes.
//   - Chunks cover the masked diff from 0 to its length, without gap or overlap.
//   - No byte of a chunk is handed on before its SHA-256 has been checked.
//   - blockdev imports no other package of shoal.
package blockdev
