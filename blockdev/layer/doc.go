// Package layer turns a layer's tar stream into an index and chunks, and back.
//
// # Purpose
//
// [Build] reads a diff (the uncompressed tar) once, from a pipe, and gives what
// a node needs to mount the layer before it has any of its data: the tree of
// files as EROFS metadata, and the chunk table of the masked diff. [Restore]
// puts the original tar together again from the masked diff and the header
// stream, which proves the two against the DiffID.
//
// # What a tree looks like
//
// The judge is containerd's own unpacking of the same layer for overlayfs
// (pkg/archive.Apply with OverlayConvertWhiteout): where it succeeds, the trees
// are equal, down to what the kernel makes of its system calls (a POSIX default
// ACL is inherited, a change of owner drops security.capability). Where it
// fails, Build fails too, with blockdev.ErrUnsupported. Headers are parsed by
// archive/tar, as containerd does. In particular:
//
//   - The last entry of a name wins; a directory over a directory keeps the
//     children; the attributes of a hard link's entry go to the shared inode.
//   - An entry for the root itself is passed over: the root is 0755, 0:0.
//   - ".wh.NAME" becomes a character device 0/0 NAME, ".wh..wh..opq" the attribute
//     trusted.overlay.opaque=y of its directory. Other names that start with
//     ".wh..wh." are treated like any whiteout.
//   - Modification times before 1970 or after 2262 become 0.
//   - Parents without an entry are 0755 and listed in Index.Implied.
//
// One thing differs on purpose: names and hard link targets that leave the root
// are refused where containerd keeps them inside. What containerd leaves to the
// clock (mtimes of whiteouts, of implied directories and of the root) is the
// entry's mtime or 0 here.
//
// # Invariants
//
//   - The result is a function of the diff alone. The size of reads, the number
//     of workers and the machine make no difference.
//   - Every byte of the diff is either content of a regular file, and lies in the
//     masked diff, or lies in the header stream.
//   - Memory is bounded by Options and the number of entries: about 300 bytes an
//     entry besides its names and attributes. Nothing is allocated because a
//     header claims a size.
//   - Input is hostile: each input gives an index or an error.
package layer
