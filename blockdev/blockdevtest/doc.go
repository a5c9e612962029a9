// Package blockdevtest checks implementations of blockdev's contracts, and
// holds stand-ins for them that other packages' tests use.
//
//   - TestSource is the conformance suite of blockdev.Source, and TestDiffSource the
//     same for a Source that makes its chunks itself. Every Source of the project runs
//     one of them: Memory here, the chain, the libp2p client, several supernodes as
//     one, the swarm, the supernode, and a node that reads a layer from its registry.
//   - Memory is a Source in memory that passes the suite.
//   - SourceFunc makes a Source of a function, for faults.
//   - Diff makes a diff of random content with its chunk table.
//
// # Invariants
//
//   - The suite asks for nothing that the comments in package blockdev do not
//     promise; where both disagree, the comments are right.
//   - Random content is a function of its seed.
package blockdevtest
