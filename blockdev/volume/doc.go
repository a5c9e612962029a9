// Package volume is a node's set of block images: it ties local diffs (cache),
// the FUSE mount that shows them (fusefs) and EROFS mounts (mount) together.
//
// # Terms
//
//   - volume: one diff and its mount. All images that have the layer share it,
//     and so share its page cache.
//   - native: mounted from the local file, which is complete; FUSE has no part
//     in it.
//   - lazy: mounted through FUSE, as long as bytes are missing.
//
// # Parts
//
// A Manager knows which volumes there are, and what is to be done with each. Its parts do
// it: connection (the FUSE mount and what answers it), mounter (mounts, mount points,
// markers), queues (prefetches, proofs, scrubs) and startups (what containers read at
// their start).
//
// # Lazy until complete, native from then on
//
// When a diff is complete, it is mounted natively as well, at another mount point: at once,
// on request, and at a start. Mount returns that one from then on, and the lazy mount is
// taken away minutes later, since containerd may be mounting something over it: overlayfs
// fails if a lower mount goes between its lookup and its copy. If a chunk turns out to be
// damaged, it goes the other way until the chunk is back, so that no container that
// starts reads bytes that are known to be wrong. An overlayfs mount has its own copy of
// the mounts that it was made of, and goes on with these: a container that started
// lazily reads through FUSE until it ends (LazyUsers). The kernel has no way to put
// another file beneath a mounted EROFS, unless there is a loop device between them:
// with those, all users of a diff become native with it.
//
// # On disk
//
//	Root/lock, tmp, diffs     the cache's (package cache)
//	Root/fuse/                the FUSE mount
//	Root/m/<name>/            mount points; name is 12 digits of the DiffID, so
//	                          that 127 of them fit in overlayfs' mount options;
//	                          a diff can have five
//	Root/lazy/<DiffID hex>    names the mount points of this diff that have, or may
//	                          have, a lazy mount; empty: all of them
//
// What is mounted where, mountinfo says: the source of each mount is the diff's
// metadata file. Only lazy or native does not show there; hence the markers,
// which are made before a lazy mount and removed after it. A marker that a crash
// left says nothing of mounts at other mount points than it names.
//
// # Invariants
//
//   - One process per Root; the cache's lock guarantees that.
//   - A read that misses bytes waits until there is a source (Attach). If one fails after
//     Detach, it is not answered: the next process has it.
//   - Each operation on a volume that does I/O holds the volume's turn, and no
//     lock. Other volumes, and reads of this one, go on.
//   - Close leaves mounts as they are. Native ones go on working without any
//     process, and Open adopts them. Lazy ones give errors from then on (unless
//     another process holds the FUSE descriptor); Open takes them away and mounts
//     them again at the same mount point.
//   - A mount that a caller was told of stays for minutes after another one has replaced
//     it, and then goes only if it is not in use.
//   - If damage is found (cache.Config.Damaged), then what was complete is fetched again
//     at once, and the kernel forgets what it has cached, also of mounts that were
//     replaced.
//   - What runs in the background on a complete diff waits for what a caller waits
//     for: scrubs for proofs, proofs for prefetch, all of them for demand reads.
//   - A volume is removed only by Remove. The caller counts the users of a volume.
package volume
