// Package proof shows, once a node has all bytes of a diff, that the index it
// was given for it is the right one.
//
// A lazy node believes the supernode: that this metadata and this chunk table
// are those of the diff that the image config names. The chunks alone prove
// nothing, since the index says which they are. But masked diff and header stream
// together are the layer's tar, whose SHA-256 must be the DiffID, which the image
// config says, which the manifest names; and an index is a function of the
// diff. So the tar is put together again, hashed, and indexed anew, in one
// pass.
//
// # Invariants
//
//   - [Run] returns nil only if the diff that was put together has the index's
//     DiffID, and the index made from it has the same metadata, chunk table and
//     implied directories.
//   - It returns ErrMismatch only for what the index says, never because bytes
//     could not be had: whoever hands them in checks them first.
//   - The diff streams: memory is that of layer.Build with one worker, whatever
//     the diff's length.
//   - How the header stream was compressed is not compared. It has given the
//     right diff, so it is right, and a later encoder may write it otherwise.
//     Everything else that an index holds cannot change without a new version
//     of the index format.
package proof
