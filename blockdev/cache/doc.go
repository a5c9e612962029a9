// Package cache keeps local diffs: what a node has of each masked diff, in a
// sparse file that fills up chunk by chunk.
//
// # On disk
//
//	Root/lock                  flock: one process per cache
//	Root/open                  during which boot the cache was opened; removed by Close. After
//	                           an unclean end it names the old boot until all diffs are open
//	Root/tmp/                  diffs that are being made or thrown away; emptied by Open
//	Root/diffs/<DiffID hex>/
//	    index                  the encoded index, as it came
//	    meta                   EROFS image (Index.Meta): device 0 of the block image
//	    data                   the masked diff, sparse, with zeros up to a multiple of 4096 bytes
//	    bitmap                 which chunks are present (format: internal/presence)
//	    headers                pieces of the header stream, as far as fetched (headers.go)
//	    proof                  that the index is proven (quarantine.go)
//	    index.own, meta.own    the tree of this node's builder, where another one has made the
//	                           index and the two differ; shown in place of meta (own.go)
//	    scrubbed               empty; when all that is here was last checked (its mtime)
//	Root/quarantine/<DiffID hex>  that an index of this diff failed its proof
//
// A diff appears by a rename out of tmp and goes by a rename into it, so a crash
// leaves a whole diff or none.
//
// # Terms
//
//   - present: the chunk's bytes are in the data file, and their SHA-256 was
//     checked before they were written.
//   - synced: present, and an fdatasync of the data file has returned since.
//   - suspect: the bytes may be in the data file, but were not synced for sure:
//     they were written before a power loss and not synced, or the bitmap was
//     damaged. Suspect is not present: the chunk's digest is checked before it
//     becomes so, which saves fetching it again.
//   - flight: the one attempt under way to get a missing chunk. Any number of
//     readers wait for the same flight.
//   - complete: every chunk present, checked and synced, and the bitmap says so
//     durably.
//   - proven: the index has been shown to be that of its DiffID, from the bytes
//     of the complete diff (package proof). It says nothing of the bytes, which
//     may be damaged or evicted later; that the digests are the right ones stays so.
//   - quarantined: that proof has failed. The diff stays, for containers that read it
//     already; its index is refused from then on.
//
// # Inside
//
// Each of these knows those below it only:
//
//	Cache      the diffs of a node: open, add, remove
//	Diff       one of them: reads, prefetch, startup, forwards, proof, scrub
//	flights    what is under way for a diff and its waiters; its own lock. group is the
//	           flights of one request and its retries, request the request itself
//	local      what is on disk of a diff, and which chunks that is
//	shared     what all diffs have in common; folder: where a diff's files lie
//	internal/  presence (the bitmap), table (the chunk table), prefetch (when it may ask, and
//	           all else that holds it back), room (quota and disk), disk (the file system)
//
// # Invariants
//
//   - The bitmap never says present of bytes that are not there. A bit is set
//     after write(2) of the chunk has returned, so a kill -9, which the page
//     cache survives, can only lose bits. The bitmap carries the boot id: after
//     a power loss only synced chunks are believed.
//   - No byte is handed to a reader that was not checked against its chunk's
//     SHA-256 when it came in. What came in stays believed while it rests on
//     the disk, as with any file system, with these exceptions: a machine that
//     went down while the cache was open leaves nothing believed of an
//     incomplete diff; zeros where nothing is synced yet may be what the kernel has
//     lost, and are checked (lost.go); Prefetch checks what this process did not write itself
//     before it says complete; Prove and Scrub check everything; and what goes to
//     another machine or another diff is checked on its way (Forward.Chunk).
//   - One flight per chunk. A reader's context ends its own wait only.
//   - No lock is held across I/O. Memory and requests in flight are bounded by
//     Config. Reads of what is present allocate nothing and take no lock.
//   - No diff's demand read waits for another diff's. What demand requests may have in
//     flight (Config.DemandBytes) is shared among diffs (package turns) and given back
//     between attempts; a read has no memory for its answer before its bytes are at
//     hand, and the chunks that it holds because they could not be written are bounded
//     and shared, too.
//   - Memory for indexes is bounded, for all contents, in all pulls and at start
//     together: Config.IndexBytes for all that are being decoded, or one larger one of
//     Config.MaxIndex by itself. Their headers say how much it will be before it is
//     allocated. What stays of an index is 42 bytes a chunk. A proof and a check read one
//     index more each, one diff at a time.
//   - A full disk, or one that fails to write, never fails a demand read and
//     never leads to wrong bytes: the reader is answered from memory and the
//     chunk stays missing. A quota that is full is like a full disk.
//   - What all diffs take of the disk, as the file system counts it, stays at or
//     below Config.Quota. Room for the most that a write may take is reserved
//     before it (internal/room).
//   - Present chunks are never taken back to make room: a peer that has been told
//     that they are here (a reader between Local and its read, a native mount)
//     may be reading them. Room is made by removing whole diffs, by the caller that
//     knows which are not used.
package cache
