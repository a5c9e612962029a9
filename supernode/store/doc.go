// Package store keeps what a supernode has fetched: chunks, each once however
// many layers have it, and the indexes of the layers, on disk, below a quota.
//
// # Layout on disk
//
//	index.db     bbolt: which chunks there are and where, diffs, layers
//	packs/<id>   chunk bytes, one file per ingested layer, or per run of
//	             recompression, appended to only
//
// Chunk bytes do not go through a database engine: they are written once, never changed
// (but moved once, see below), and deleted a whole diff at a time, so a log or a tree
// that moves them about costs CPU and disk for nothing, and frees space only some time
// later (measured: pebble and badger needed 50 to 500 % of the bytes alive after half
// of them had been deleted, packs with bbolt none; and 136 MiB of memory against 324
// and 862). A pack is written by one ingest session, or one run of recompression. Space
// of chunks that no diff refers to any more is given back to the file system at once,
// by punching a hole, or by deleting the pack when nothing in it is alive. Offsets in a
// pack are never used again.
//
// On btrfs a hole gives space back only when the whole extent (up to 128 MiB)
// is dead; ext4, xfs, zfs and tmpfs free every 4 KiB block.
//
// # Parts
//
// A Store has its parts, each with a lock of its own that is never held across I/O:
// packs (the files), database (index.db; a change is one write transaction), catalogue
// (what is published, in memory), holds (chunks that ingests count on), sessions (the
// ingests), space (the quota), recompressor, and for the time of a Check a checker. What
// concerns several of them (publish, remove, evict, damage) is the Store's.
//
// # Compression
//
// An ingest stores chunks raw: compressing them takes more of a processor than
// everything else that an ingest does, and nodes wait for the ingest. They
// are compressed in the background, by one goroutine, when there has been no
// ingest for Config.Idle, and in small portions: it stops when an ingest begins,
// and while chunks are served all the time it does one portion in a while. A run
// of it reads chunks that are due in the order in which they lie, writes zstd
// frames to a new pack, syncs it, moves the records there in one transaction,
// and frees the old places. A chunk that a frame does not make at least 1/16
// shorter stays where it is. Until then a chunk takes of the quota what it takes
// of the disk, its raw length. A run needs a little room below the quota, and
// evicts nothing to get it.
//
// # index.db, format 2
//
// A store in which no layer was ever published in batches says format 1, which earlier
// versions read as well.
//
// All integers are little-endian, except those in keys, which are big-endian so
// that they sort. Buckets:
//
//	meta    "format" -> uint32 1 or 2
//	chunks  SHA-256 of the raw bytes (32) -> chunk record (44 bytes):
//	        pack id u64, offset u64, stored length u32, raw length u32,
//	        CRC-32C of the stored bytes u32, references u32 (diffs that have the
//	        chunk, or lists of one: see below), flags u32 (1: stored as one zstd frame, else raw;
//	        2: damaged; 4: raw, still to be compressed), zero u32, CRC-32C of the 40 bytes before it u32
//	        A damaged one of stored length 0 is in place of a record that could not be
//	        read, or was gone: the chunk lies nowhere
//	diffs   DiffID (32) -> JSON diffRecord: where index and reference list lie,
//	        sizes, last use
//	layers  layer digest (32) -> JSON layerRecord: DiffID, size, origins
//	packs   pack id u64 -> u64 live extents in the pack (chunks and blobs)
//	dead    pack id u64, offset u64 -> u64 length: to be punched; written in the
//	        transaction that frees the extent, removed after it was punched
//	orphans SHA-256 (32) -> nothing: records with no reference that a running
//	        ingest holds
//	unpublished  pack id u64 -> JSON unpublishedRecord: reference lists that count and
//	        belong to no diff: of a running ingest, by its pack, or of a diff that was
//	        removed, by the pack of its index
//	due     pack id u64, offset u64 -> SHA-256 (32), raw length u32: the chunk
//	        there is still to be compressed; one for every record with flag 4
//
// Close writes bbolt's list of free pages, and the next transaction takes it back
// (boltcheck.Seal). If the list is there, then the store was closed in good order, and Open
// reads no more of index.db than it needs; otherwise Open checks all pages.
//
// A diff's encoded index and its reference lists (the digests of its chunks and
// header pieces, sorted, each once in a list, 32 bytes each) are extents of the pack of
// the ingest that published it, CRC-32C as chunks.
//
// # Batches
//
// Memory and transactions do not grow with a layer: after each 8,192 chunks an ingest
// commits what it has put, with one reference for each, and a list of them. The lists
// are unpublished until Publish makes them those of the diff, in one transaction; if
// that does not come, Abort or the next Open takes the references back, list by list.
// A diff of many lists is removed in the same way: it is out of sight with the first
// transaction.
//
// # Invariants
//
//   - What index.db says is on disk: what a pack holds is synced before the transaction
//     that first names it commits. A pack that index.db does not name is
//     deleted when the store is opened; so a crash leaves nothing behind.
//   - Bytes are freed only after the transaction that dropped the last
//     reference has committed.
//   - A chunk's place changes only in the transaction that a run commits, and
//     only if it is still the place that the run has read. A reader that has looked up the
//     old place reads the right bytes there, or fails its checksum and looks
//     again; it is damage only if the place is still the same.
//   - A chunk that a running ingest has put, or found present, stays until that
//     ingest publishes or aborts. A pinned diff is never evicted.
//   - Used disk space (blocks of packs and of index.db, and what running
//     ingests have reserved) stays at or below the quota.
//   - Wrong bytes are never returned: what fails its checksum is ErrCorrupt, is
//     not used to satisfy a later Put, and its layers are forgotten, so that
//     they are fetched again.
package store
