// Package proof shows, once a node has all bytes of a diff, that the index it
// was given for it is the right one.
//
// A lazy node believes the supernode: that this metadata and this chunk table
// are those of the diff that the image config names. The chunks alone prove
// nothing, since the index says which they are. But masked diff and header stream
// together are the layer's tar, whose SHA-256 must be the DiffID, which the image
// config says, which the manifest names; and an index is a function of the
// diff and the builder. So the tar is put together again, hashed, and indexed again, in one
// pass.
//
// # Invariants
//
//   - [Run] returns no error only if the diff that was put together has the index's
//     DiffID, and the index made from it has the same chunk table.
//   - Metadata and implied directories are the same, too, or the index says that
//     another version of the builder has made it (layer.BuilderVersion), and Run
//     returns the index that this one makes. That is the proven one then, and the
//     caller's to show in place of the given one: the supernode is not accused, since a
//     bug that was mended in one of the two looks the same. A liar that names another
//     version gains nothing by it but that he is not accused.
//   - It returns ErrMismatch only for what the index says, never because bytes
//     could not be read: the caller checks them first.
//   - The diff streams: memory is that of layer.Build with one worker, whatever
//     the diff's length.
//   - How the header stream was compressed is not compared. It has given the
//     right diff, so it is right, and a later encoder may write it otherwise.
//     The chunk table cannot change without a new version of the index format.
package proof
