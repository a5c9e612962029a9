// Package index reads and writes the encoded form of blockdev.Index: what a
// supernode hands out and a node keeps on disk.
//
// # Purpose
//
// One codec, in both directions, so that what is written can be read and what
// is read was meant. The bytes are described in docs/formats.md, section
// "Index".
//
// # Invariants
//
//   - Same index, same bytes, from the same build of shoal. Another build may
//     come with another compressor; what the header's checksum covers is the
//     content before compression and therefore always the same. Compare
//     indexes by content, not by their encoded bytes.
//   - Decode(Encode(x)) is x. Encode refuses what Decode would refuse.
//   - For every b that Decode accepts, Encode(Decode(b)) differs from b at most
//     in the zstd frame and its length; checksum, digests and all other fields
//     are the same.
//   - Input is hostile: every length is checked before it is believed, memory is
//     bounded by the limits below, and nothing may follow the end.
package index
