// Package ingest turns a layer, as a registry sends it, into chunks and an index
// in the store.
//
// # Pipeline
//
//	registry -> spool file -> decompress -> blockdev/layer -> store
//
// The network side writes the compressed bytes into a spool file as they come
// and hashes them; the unpacking side follows behind it in that file. So the
// registry's connection is read at line rate however slow the processors are,
// nothing but disk is needed for what runs ahead, and a connection that breaks,
// or a process that is killed, costs the rest of the layer only: the next
// attempt asks for the bytes from the end of the spool file on.
//
// # Spool files
//
// One per layer, size and registry, named <layer digest>-<16 digits of SHA-256 of
// "size host">, holding a prefix of the blob. It is deleted once the layer is
// published or found wrong, kept when the cause may pass, and deleted when
// no ingest has gone on with it for Config.SpoolExpiry. What it holds is not
// believed after a crash: the whole blob is hashed again.
//
// # Turns
//
// A layer has a place for as long as its registry sends at least Config.LeastRate, or
// no layer waits for a place or for room in the spool. Else its turn ends after
// Config.Turn: it keeps its spool file, and queues behind all layers that have had
// fewer turns. What is there is unpacked again in the next one, so each turn that may
// be cut short is twice as long as the one before, up to 32 times.
//
// # Invariants
//
//   - A layer is published only when its compressed bytes have its digest and
//     size, its tar stream has the DiffID that the image config says, and all its
//     chunks are in the store; else nothing of it stays but the spool file.
//   - All bytes of a flight come from one registry host. A published origin is a
//     repository of it that has sent some of the blob, or the host if all of it
//     was in the spool.
//   - One flight per layer, size and registry host, however many ask. Callers may
//     leave; the flight goes on while a caller waits, and Config.Grace longer.
//   - A registry's refusal, or its wish to be asked later, is for those alone that show it
//     the same of the same repository: for others that wait the flight asks, too.
//   - Spool files together stay within Config.SpoolQuota. A layer that waits for room
//     in it has no place at that time.
//   - Memory depends on a layer's number of files and, by some 100 bytes each, of
//     chunks, for the index. Not on its bytes otherwise.
package ingest
