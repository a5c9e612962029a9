// Package presence knows which chunks of a diff are on disk: in memory (Chunks) and in
// the bitmap file beside the data. It reads and writes no data, and learns what it knows
// from its callers.
//
// Terms are those of package cache: present, synced, suspect.
//
// # Invariants
//
//   - A chunk is synced only if it is present, and is never present and suspect.
//   - No lock is held across I/O. Has and HasAll take none.
//   - No bitmap file, however damaged, makes a chunk present whose record does not match
//     its checksum.
package presence
