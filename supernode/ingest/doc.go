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
// nobody has gone on with it for Config.SpoolExpiry. What it holds is not
// believed after a crash: the whole blob is hashed again.
//
// # Invariants
//
//   - A layer is published only when its compressed bytes have its digest and
//     size, its tar stream has the DiffID that the image config says, and all its
//     chunks are in the store; else nothing of it stays but the spool file.
//   - All bytes of a flight come from one registry host. A published origin is a
//     repository of it that has sent some of the blob, or the host if all of it
//     was in the spool.
//   - One flight per layer, size and registry host, however many ask. Those who ask may
//     leave; the flight goes on while somebody waits, and Config.Grace longer.
//   - Spool files together stay within Config.SpoolQuota.
//   - Memory does not depend on the layer's size, only on its number of files.
package ingest
