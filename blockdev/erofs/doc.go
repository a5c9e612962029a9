// Package erofs writes EROFS metadata images: the device 0 of a block image.
//
// # Purpose
//
// [Write] turns a tree of inodes into the bytes that the Linux kernel mounts.
// Names, attributes and symlink targets are in the image itself; what regular
// files contain is addressed on one extra device (device 1), the masked diff,
// where it lies in the layer's tar stream. Tar aligns content to 512 bytes, so
// blocks have 512 bytes, which Linux mounts from 6.4 on (earlier versions
// insist on blocks as large as a page).
//
// The format is that of fs/erofs/erofs_fs.h in the Linux kernel; what this
// package makes of it is described in docs/formats.md, section "EROFS
// metadata".
//
// # Invariants
//
//   - Same tree, same bytes: no clock, no random numbers, no map order. The
//     volume's UUID is a hash of the image.
//   - A tree is checked as a whole before the first byte is written; after
//     that, only the io.Writer can fail.
//   - The input is not changed, and not kept.
//   - An image is never larger than [MaxSize]. Memory is bounded by the tree:
//     about 130 bytes an inode beside it, and garbage of some 500 while the tree
//     is listed; content, chunk maps and directory blocks are made while they
//     are written.
//   - Everything emitted satisfies the strictest reader known: inline symlinks
//     and tails lie in one block, chunk maps are 8-byte aligned, the root's nid
//     fits 16 bits, and no nid is 0 (readdir hides inode number 0).
package erofs
