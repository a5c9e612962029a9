// Package exchange moves chunks, indexes, manifests and startup profiles between machines over libp2p
// streams. Server answers from a store of chunks and a source of images; Client
// is a blockdev.Source and a image.Source whose bytes come from one
// server. docs/formats.md, "Wire protocol", describes what is said.
//
// # Terms
//
//   - request: up to 256 digests of one diff, answered in any order on the
//     stream that it came on. Streams are used again, so that a demand read
//     costs one round trip.
//   - lane: the client's streams of one kind (demand, startup, prefetch, forwards,
//     images, documents, reports) with its own limit, so that no kind waits for
//     another.
//   - window: the prefetch bytes that a machine has asked for and not received. Each
//     of them can delay a demand read that is queued behind it.
//
// # Invariants
//
//   - Neither end waits for the other without a deadline, nor holds more for one
//     stream than a few chunks.
//   - The client believes nothing: each frame is for a chunk that was asked for
//     and has not come, with the length that the index says, and Deliver judges the bytes. A peer that breaks a rule loses
//     the stream, and the error wraps blockdev.ErrCorrupt.
//   - The server never queues a request beyond its limits: it answers busy.
//   - Demand goes first: while a peer waits for one, its prefetches pause, and
//     what it asks for by a startup profile nearly so.
//   - No lock is held across I/O.
package exchange
