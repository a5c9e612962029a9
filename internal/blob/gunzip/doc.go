// Package gunzip decompresses gzip streams (RFC 1952, RFC 1951).
//
// # Purpose
//
// Inflating is most of what an ingest costs, and the one part of it that cannot
// be spread over processors: a gzip stream can only be read from its start. So
// while the rest of the pipeline runs beside it, a container that is started for
// the first time in its datacenter waits for this. The readers of compress/gzip
// and klauspost/compress take a byte at a time from their input; this one keeps
// up to 63 bits at hand, decodes up to three literals between two looks at the
// input, copies matches 16 bytes at a time, and has all codes of up to 11 bits in
// one table. BenchmarkReader compares the three.
//
// # Invariants
//
//   - What compress/gzip accepts is accepted and gives the same bytes, and what it
//     refuses is refused. That includes streams of several members. FuzzReader
//     compares the two.
//   - One thing differs on purpose: what follows a member and does not begin as one ends
//     the stream, as with gzip, pigz, and so containerd where that has unpigz. What begins as
//     one and is none is an error, as with gzip: pigz passes over it, if its header is cut.
//   - Bytes come out only if all their bits were there: a stream that is cut gives a
//     prefix of its content and io.ErrUnexpectedEOF.
//   - A Reader takes about 500 KiB of memory, for each input.
//   - Input is hostile. There is no unsafe code here: an index out of range would
//     be a panic, and none is possible in what the fuzzer has seen.
package gunzip
