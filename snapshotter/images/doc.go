// Package images is a node's catalogue of images: which are here, what uses their diffs,
// and how those that are asked for get here. It knows containerd's snapshots only through
// Snapshots.
//
// # Terms
//
//   - opening: one attempt to get the indexes of an image in one round trip
//     (image.Source), and to have the data path (Data) add and mount all of its
//     diffs.
//   - pull: one decision, for all layers of an image: lazy or not.
//   - right: a credential that a pull has shown at the registry mirror.
//   - wish: somebody wants all bytes of some diffs: a container that runs, or a pull that
//     no container has followed.
//   - kept: opened without a pull, to be prefetched.
//
// # Invariants
//
//   - All layers of an image are lazy or none is: every index is added and every
//     diff mounted before the first layer is answered. What was decided holds for
//     the rest of the pull. An image that is not lazy is unpacked by containerd in
//     the ordinary way, and one log line names the image and the cause.
//   - A diff is in use while a snapshot names it, a pull that opened it is under
//     way, or it is kept. A diff in use is never removed from the data path; one that
//     is not is removed by the next Cleanup, or at the next start.
//   - A diff is on record before the data path has it, so none is there that is not
//     listed. Lost records are made again from the diffs that are there.
//   - A private image is opened only for a pull that has shown a credential for it, or
//     by Config.NodeCredentials: a name can come from anybody's manifest.
//   - No lock is held while anybody waits, or during I/O.
package images
