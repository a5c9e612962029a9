// Package room counts what the diffs take of the disk, so that Config.Quota holds and
// the disk is not filled to the last byte, and has room made when there is none. It knows
// of each diff only what its Share measures.
//
// # Invariants
//
//   - The count is never below what is on disk, and never above the quota.
//   - Before a write, room for the most that it may take is reserved.
//   - No lock is held across I/O or MakeRoom. MakeRoom is called by one goroutine at a
//     time, and never while a chunk whose bytes are at hand waits for it.
package room
