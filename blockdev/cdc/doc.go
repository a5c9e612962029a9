// Package cdc cuts a masked diff into content-defined chunks.
//
// The algorithm is FastCDC (Xia et al., "FastCDC: a Fast and Efficient
// Content-Defined Chunking Approach for Data Deduplication", USENIX ATC 2016):
// a Gear rolling hash, no hashing below the minimum, and normalised chunking
// (a strict condition below the normal size, a lax one above it). The sizes are
// those of package blockdev: 16 KiB to 256 KiB, about 64 KiB on average.
//
// One thing is added to it. The builder of an index knows where the contents of files
// begin and end, and a rebuild replaces whole files, so cuts are best where
// files meet: a changed file then costs its own chunks and not its neighbours'.
//
// # Invariants
//
//   - Where the cuts fall is part of the index format: the same bytes with the
//     same files in them are always cut at the same places, on every machine,
//     however they are handed in. The gear table and the conditions must
//     therefore never change; a test pins them.
//   - No chunk is shorter than blockdev.MinChunk, the last one excepted, and
//     none is longer than blockdev.MaxChunk.
//   - A Chunker holds no data, allocates nothing and never copies: it says where
//     the next cut is, and the caller keeps the bytes where it likes.
//
// # The cut rule
//
// Let n be the number of bytes in the chunk so far and h its hash, 0 until
// n = MinChunk. For each byte b from then on h = (h << 1) + gear[b] mod 2^64,
// and there is a cut behind b if
//
//	h < 2^46 and n <= NormalChunk, with b counted in n, or
//	h < 2^50 and n > NormalChunk, or
//	n = MaxChunk.
//
// The top bits decide since they depend on the most bytes of the past: the
// paper spreads its mask over the word for the same reason.
//
// Furthermore, if n >= MinChunk, there is a cut
//
//	before the content of a file of BigFile bytes or more,
//	behind the content of such a file, and
//	behind the content of any other file if h * mixer mod 2^64 < 2^61,
//	which holds for one file in eight.
package cdc
