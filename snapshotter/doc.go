// Package snapshotter is containerd's side of a shoal node: a snapshotter whose
// image layers need not be unpacked, nor even be there.
//
// # What it does
//
// It is an overlayfs snapshotter in all that is not lazy: without the labels
// below it passes containerd's own test suite and lays out its directories as
// containerd's overlayfs snapshotter does.
//
// When containerd is about to unpack a layer it calls Prepare with the label
// containerd.io/snapshot.ref, the ChainID that the layer will have. This package asks
// the node's catalogue of images (package images), which opens the whole image at the
// first such call of a pull, and commits the layer as a snapshot that holds nothing but
// the DiffID. The answer is AlreadyExists, and containerd skips the download.
//
// # Invariants
//
//   - A DiffID is believed only if the ChainID that it gives is the one containerd
//     computed from the image config it has verified.
//   - Which diff a snapshot stands for is recorded in the snapshot's own labels, in
//     the transaction that creates it. Clients cannot set or change these labels.
//   - The catalogue counts a snapshot's use of a diff before the snapshot can be seen,
//     and until it is gone.
//   - Everything else on disk can be lost at any moment (kill, power) and is put
//     right at the next start: directories without a snapshot, diffs without use.
//
// # Layout below Config.Root
//
// The data path may have the same Root, with other names.
//
//	metadata.db   snapshots: containerd's core/snapshots/storage
//	shoal.db      the catalogue of images
//	s/<id>/fs     an ordinary snapshot's directory, or a lazy one's fix-ups
//	s/<id>/work   overlayfs work directory of an active snapshot
//	s/<id>/i/<n>  clones of lower directories: id-mapped, where asked for; of block
//	              images, as long as containerd unpacks a layer on top of them
//	l/<name>      short symbolic links, for chains too long for one page of options
//	scratch/      directories being made; emptied at start
//
// # Fix-ups
//
// A layer's tar may have entries below a directory and none for the directory
// itself. containerd then gives the directory the attributes that it has in the
// layers below. A block image, made from one layer alone, cannot know them, so a
// directory tree that holds just these directories, with the attributes looked up
// in the chain, goes on top of the block image in overlayfs' list.
package snapshotter
