// Package profiles keeps what nodes have learned of the starts of containers: which chunks
// they read first, by diff.
//
// # Invariants
//
//   - A report is worth as much as the node that sends it. It is kept only if it speaks of a
//     diff whose index that node was handed, and names chunks that the diff has; beyond that
//     it only says in which order nodes fetch.
//   - A profile is made of few reports, each of another peer. One peer cannot crowd others
//     out, and a rollout of a thousand nodes does not wear down the disk.
//   - A profile outlives the diff's chunks: when they come back, they have the same numbers.
//   - Everything is bounded: the diffs that are reported on longest ago go first.
package profiles
