// Package chain asks several sources of chunks one after the other: peers and the
// supernode first, the registry last.
//
// # Invariants
//
//   - What a source has not delivered, the next one is asked for; what one has
//     delivered wrongly (blockdev.ErrCorrupt), too.
//   - A source that stays silent does not use up the time of the others: after
//     Step.Patience without a chunk, a demand request goes on to the next one,
//     and for a while demand requests for that diff try the silent source last.
//   - A source that is unavailable has the same time as one that is silent (Step.Away),
//     unless it is known to have been away for that long: a restart sends no read on.
//   - A source that is silent about one diff may be well: requests for other diffs go to
//     it as before, until it was silent about two and not heard of in between.
//   - The error names every source that was asked, and why each has failed. It
//     wraps what makes trying again worth while, if any of them gives hope.
package chain
