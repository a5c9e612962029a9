// Package image is what a node asks of an image before it has any of its bytes: the
// indexes of its layers, and the small documents (manifest, image index, config) that
// a client reads first. It holds the contracts between those that ask (the snapshotter,
// the registry mirror), those that pass on (p2p) and those that answer (the supernode);
// chunks and what is made of them are package blockdev's, which does not know of images.
//
// # Terms
//
//   - request: an image reference, the platform, and the credential that the node has
//     for the image's registry.
//   - source: where the answer comes from: a supernode, or several of them.
//   - document: a manifest, an image index or an image config, byte for byte.
//   - stage: what is being done with a layer that is not ready yet, for people.
//
// # Invariants
//
//   - The package has types and no behaviour: nothing here does I/O.
//   - What comes back is not believed here: callers check indexes and documents
//     against the digests that they know.
package image
