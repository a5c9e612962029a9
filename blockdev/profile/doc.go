// Package profile encodes and merges startup profiles (blockdev.Profile): which
// chunks of a diff containers read in their first seconds, and in what order.
//
// # Encoding
//
// docs/formats.md, "Startup profile", is the format. It is compact, since it
// travels with every index: three bytes a chunk as a rule.
//
// # Invariants
//
//   - Decode gives a profile that follows the rules, for each input: at most
//     blockdev.MaxProfile chunks, each once and below the number of chunks, ranks
//     that never fall. Its errors wrap blockdev.ErrCorrupt.
//   - Merge is a function of the reports and their order alone.
package profile
