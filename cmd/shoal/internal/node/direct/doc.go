// Package direct gets the chunks of a layer straight from its registry, for a node
// that no peer and no supernode can give them. It is the last of a node's sources,
// and the slowest: a compressed layer can be read from its start only.
//
// # Terms
//
//   - pass: one download of one layer, decompressed and cut into chunks just as a
//     supernode does it (blockdev/layer). A read that waits for a chunk gets it when
//     the pass comes to it; all other chunks are offered to Config.Keep.
//
// # Invariants
//
//   - One pass per diff at a time, however many ask. A chunk that has gone by and
//     was not kept is waited for until the next pass.
//   - A pass goes on while a read waits, and Config.Linger longer.
//   - At most Config.Passes of them side by side, each with some megabytes of
//     memory.
//   - Nothing is believed: what is delivered has the digest that was asked for. A
//     blob that is something else has no such chunk.
//   - A connection that breaks is made again from where it ended, while that
//     brings bytes.
package direct
